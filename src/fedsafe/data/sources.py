"""Read training conversations from files or the hub, and say clearly what cannot be used.

Three formats of a row: `messages`; `prompt` and `response`; `instruction`, `input` (may be empty)
and `output`. Each may carry `client`, `label` (safe or unsafe) and `category`.

A file is read once: its rows, good and bad, are cached as an Arrow file under a key made of the
file's content, so that an edited file is read again and a bad row is reported every time.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError, DatasetsError

from fedsafe.data.fields import (
    NUM_SHOWN,
    BadRowError,
    fields_of,
    kind,
    refuse_misspelt,
    require,
    shortened,
    text_of,
    turns_of,
    unread_in_turns,
)
from fedsafe.data.readers import READERS, Row
from fedsafe.types import Conversation, Label, Sample, Turn

_CACHE_VERSION = 3
_FORMATS = {
    "messages": ("messages",),
    "prompt/response": ("prompt", "response"),
    "instruction/input/output": ("instruction", "output"),
}
_OPTIONAL = ("client", "label", "category")
_KNOWN = ("messages", "prompt", "response", "instruction", "input", "output", *_OPTIONAL)
_TURN = {"role": datasets.Value("string"), "content": datasets.Value("string")}
_FEATURES = datasets.Features(
    {
        "messages": datasets.List(_TURN),
        **{name: datasets.Value("string") for name in (*_OPTIONAL, "source")},
        "row": datasets.Value("int64"),
        # Only in the cache: why the row cannot be used, and which of its columns were not read.
        "problem": datasets.Value("string"),
        "ignored": datasets.Value("string"),
    }
)


class Rejected(NamedTuple):
    """A row that is left out, as `rejected.jsonl` records it: never its text."""

    source: str
    row: int
    reason: str


class CheckedRow(NamedTuple):
    """A row as its file has it, and the sample it holds or why it holds none."""

    record: dict[str, Any]
    sample: Sample | None
    rejected: Rejected | None


def load_samples(
    paths: str | Sequence[str],
    *,
    split: str = "train",
    on_bad_row: Literal["error", "skip"] = "error",
    rejected: Path | None = None,
) -> datasets.Dataset:
    """Read the samples of files or hub datasets, one after the other.

    Args:
        paths: Files (.jsonl, .jsonl.gz, .json, .csv, .parquet), or else a dataset folder or hub
            name that `datasets.load_dataset` takes, with `:folder` for a part of it; one or
            several.
        split: Split to take of a dataset folder or hub name.
        on_bad_row: `error` stops at rows that cannot be used and lists them; `skip` leaves them
            out and warns of their number.
        rejected: JSONL file to which skipped rows are added as source, row and reason.

    Returns:
        The usable rows with the columns of `fedsafe.types.Sample`.

    Raises:
        ValueError: If a file is missing, empty or of an unknown type, or rows cannot be used.
    """
    names = names_of(paths)
    checked = datasets.concatenate_datasets([_load_checked(name, split=split) for name in names])
    combinations = pc.unique(checked.data.column("ignored")).drop_null().to_pylist()
    warn_of_ignored(column for each in combinations for column in each.split(", "))
    samples, bad = _part_bad_rows(checked)
    account_for(bad, names=names, total=len(checked), on_bad_row=on_bad_row, rejected=rejected)
    return samples


def names_of(paths: str | Sequence[str]) -> list[str]:
    """The sources that a setting names, one or more."""
    names = [paths] if isinstance(paths, str) else list(paths)
    if not names:
        raise ValueError("no path is given; give at least one file or hub name")
    return names


def account_for(
    bad: Sequence[Rejected],
    *,
    names: Sequence[str],
    total: int,
    on_bad_row: Literal["error", "skip"],
    rejected: Path | None,
) -> None:
    """Raise what is to be raised where rows cannot be used, else say that they are left out."""
    if bad and on_bad_row == "error":
        raise bad_rows_error(bad, total=total)
    if bad:
        report_rejected(bad, total=total, rejected=rejected)
    if len(bad) == total:
        raise no_rows_error(bad, names=names)


def bad_rows_error(bad: Sequence[Rejected], *, total: int) -> ValueError:
    """What to raise where bad rows are not to be skipped."""
    return ValueError(
        f"{len(bad)} of {total} rows cannot be used:\n{_listed(bad)}\n"
        "Correct them, or set on_bad_row: skip to leave them out."
    )


def no_rows_error(bad: Sequence[Rejected], *, names: Sequence[str]) -> ValueError:
    """What to raise where no row is left."""
    return ValueError(f"no row of {', '.join(names)} can be used:\n{_listed(bad)}")


def iterate_rows(name: str, *, split: str) -> Iterator[Row]:
    """Read the rows of one source as they are, one at a time; nothing is cached.

    Raises:
        ValueError: If the source is missing, empty or of an unknown type.
    """
    reader = _reader_of(name)
    rows: Iterator[Row]
    if reader is None:
        rows = map(Row, count(), _load_hub(name, split=split))
    else:
        rows = reader(_existing(name))
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise _empty(name)


def iterate_file(name: str) -> Iterator[CheckedRow]:
    """Read and check the rows of a file one at a time; nothing is cached.

    Args:
        name: A file of a type that `load_samples` takes.

    Raises:
        ValueError: If the file is missing, empty or of an unknown type.
    """
    if _reader_of(name) is None:
        raise ValueError(f"{name} has an unknown file type; known are {', '.join(READERS)}")
    for row in iterate_rows(name, split="train"):
        parsed, problem = _checked(row)
        if problem is None:
            del parsed["ignored"]
            sample = cast(Sample, {**parsed, "source": name, "row": row.number})
            yield CheckedRow(cast(dict[str, Any], row.record), sample, None)
        else:
            yield CheckedRow({}, None, Rejected(name, row.number, problem))


def with_answer(record: dict[str, Any], answer: str) -> dict[str, Any]:
    """A usable row with another last answer, in whichever of the formats it is.

    No copy of the former answer is left: beside `messages` a `response` and an `output` are always
    replaced, and so is any other column with the same text.
    """
    former = parse_sample(record)["messages"][-1]["content"].strip()
    turns = record.get("messages")

    def is_answer(name: str, value: object) -> bool:
        if turns and name in ("response", "output") and value is not None:
            return True
        may_hold_it = name in ("response", "output") or name not in _KNOWN
        return may_hold_it and isinstance(value, str) and value.strip() == former

    changed = {n: answer if is_answer(n, value) else value for n, value in record.items()}
    if turns:
        changed["messages"] = [*turns[:-1], {**turns[-1], "content": answer}]
    return changed


def report_rejected(bad: Sequence[Rejected], *, total: int, rejected: Path | None) -> None:
    """Warn of rows that are left out, and add them to the file."""
    where = ""
    if rejected is not None:
        where = f" (all are listed in {rejected})"
        rejected.parent.mkdir(parents=True, exist_ok=True)
        with rejected.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(each._asdict(), ensure_ascii=False) + "\n" for each in bad)
    warnings.warn(f"left out {len(bad)} of {total} rows{where}:\n{_listed(bad)}", stacklevel=3)


def warn_of_ignored(columns: Iterable[str]) -> None:
    """Name the columns that nothing is taken from."""
    if named := sorted(set(columns)):
        warnings.warn(f"columns of no format are not read: {', '.join(named)}", stacklevel=3)


def place_of(source: str, row: int) -> str:
    """Where a row stands, in words: `a.jsonl, line 3`."""
    has_lines = source.lower().endswith((".jsonl", ".jsonl.gz", ".csv"))
    return f"{source}, {'line' if has_lines else 'row'} {row}"


def _listed(bad: Sequence[Rejected]) -> str:
    lines = [f"  {place_of(each.source, each.row)}: {each.reason}" for each in bad]
    more = [f"  and {len(bad) - NUM_SHOWN} more"] if len(bad) > NUM_SHOWN else []
    return "\n".join(lines[:NUM_SHOWN] + more)


def _part_bad_rows(checked: datasets.Dataset) -> tuple[datasets.Dataset, list[Rejected]]:
    is_bad = checked.data.column("problem").is_valid().to_numpy()
    bad_rows = checked.select_columns(["source", "row", "problem"]).select(np.flatnonzero(is_bad))
    bad = [Rejected(each["source"], each["row"], each["problem"]) for each in bad_rows]
    samples = checked.remove_columns(["problem", "ignored"])
    return samples.select(np.flatnonzero(~is_bad)) if bad else samples, bad


def _load_checked(name: str, *, split: str) -> datasets.Dataset:
    """All rows of one source, bad ones too, with what is wrong with them; cached."""
    reader = _reader_of(name)
    if reader is not None:
        path = _existing(name)
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return _cached(lambda: reader(path), source=name, content=content)
    rows = _load_hub(name, split=split)
    return _cached(lambda: map(Row, count(), rows), source=name, content=rows._fingerprint)


def _reader_of(name: str) -> Callable[[Path], Iterator[Row]] | None:
    return next((read for end, read in READERS.items() if name.lower().endswith(end)), None)


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name} is missing; give the path of an existing file")
    return path


def _cached(read: Callable[[], Iterable[Row]], *, source: str, content: str) -> datasets.Dataset:
    # The name is in the key because the rows carry it.
    key = hashlib.sha256(f"{_CACHE_VERSION}\0{content}\0{source}".encode()).hexdigest()[:32]
    try:
        rows = datasets.Dataset.from_generator(
            _check_rows,
            features=_FEATURES,
            gen_kwargs={"read": read, "source": source},
            fingerprint=key,
        )
    except DatasetGenerationError as error:
        # The wrapper says only that something failed: an empty source, a full disk.
        raise error.__cause__ or error from None
    return cast(datasets.Dataset, rows)


def _load_hub(name: str, *, split: str) -> datasets.Dataset:
    if Path(name).is_file():
        raise ValueError(f"{name} has an unknown file type; known are {', '.join(READERS)}")
    hub_name, _, folder = name.partition(":")
    try:
        rows = datasets.load_dataset(hub_name, data_dir=folder or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"cannot load split {split!r} of {name!r}: {error}; give a hub name, a dataset folder, "
            f"or a file of type {', '.join(READERS)}"
        ) from error
    return cast(datasets.Dataset, rows)


def _check_rows(read: Callable[[], Iterable[Row]], source: str) -> Iterator[dict[str, Any]]:
    number = None
    for row in read():
        number = row.number
        parsed, problem = _checked(row)
        yield {**parsed, "source": source, "row": number, "problem": problem}
    if number is None:
        raise _empty(source)


def _empty(source: str) -> ValueError:
    return ValueError(f"{source} is empty; it needs at least one sample")


def _checked(row: Row) -> tuple[dict[str, Any], str | None]:
    """The columns of a row, all None if it cannot be used, and why it cannot."""
    problem = row.problem
    if problem is None:
        try:
            return parse_sample(row.record), None
        except BadRowError as error:
            problem = str(error)
    return dict.fromkeys(("messages", *_OPTIONAL, "ignored")), row.place + problem


def parse_sample(record: object) -> dict[str, Any]:
    """The columns of a row in one of the formats, and as `ignored` the names of those not read.

    Raises:
        BadRowError: If it cannot be used.
    """
    fields = fields_of(record, optional=_OPTIONAL)
    refuse_misspelt(fields, _KNOWN)
    used = _format_of(fields)
    ignored = fields.keys() - {*used, "input", *_OPTIONAL}
    if "messages" in used:
        messages = _messages(fields)
        ignored |= unread_in_turns(fields, "messages")
    else:
        prompt = text_of(fields, used[0])
        if "instruction" in used and fields.get("input"):
            prompt += "\n\n" + text_of(fields, "input")
        answer = text_of(fields, used[1])
        messages = [Turn(role="user", content=prompt), Turn(role="assistant", content=answer)]
    return {
        "messages": messages,
        "client": _name(fields, "client"),
        "label": _label(fields),
        "category": _name(fields, "category"),
        "ignored": ", ".join(sorted(ignored)) or None,
    }


def _format_of(fields: dict[str, Any]) -> tuple[str, ...]:
    """Names of the required fields of the first format that the row has, complete if possible."""
    for names in _FORMATS.values():
        if fields.keys() >= set(names):
            return names
    for names in _FORMATS.values():
        if fields.keys() & set(names):
            require(fields, names)
    raise BadRowError(
        f"is in none of the formats {', '.join(_FORMATS)}; its columns: {shortened(fields)}"
    )


def _messages(fields: dict[str, Any]) -> Conversation:
    conversation = turns_of(fields, "messages")
    if not conversation or conversation[-1]["role"] != "assistant":
        raise BadRowError("has no answer: the last turn is not the assistant's")
    if all(turn["role"] != "user" for turn in conversation):
        raise BadRowError("has no turn of the user")
    return conversation


def _name(fields: dict[str, Any], name: str) -> str | None:
    """A client or category; data sets often number them."""
    if name not in fields:
        return None
    return str(fields[name]) if type(fields[name]) is int else text_of(fields, name)


def _label(fields: dict[str, Any]) -> Label | None:
    value = fields.get("label")
    if value not in (None, "safe", "unsafe"):
        raise BadRowError(f"`label` is {kind(value)}, not safe or unsafe")
    return cast(Label | None, value)
