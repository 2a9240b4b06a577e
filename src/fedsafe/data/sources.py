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
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError, DatasetsError

from fedsafe.data.readers import READERS, Row
from fedsafe.types import Conversation, Label, Sample, Turn

_CACHE_VERSION = 3
_NUM_SHOWN = 5
_NAME_LENGTH = 20
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


class _BadRowError(Exception):
    """Says what is wrong with one row."""


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
            name that `datasets.load_dataset` takes; one or several.
        split: Split to take of a dataset folder or hub name.
        on_bad_row: `error` stops at rows that cannot be used and lists them; `skip` leaves them
            out and warns of their number.
        rejected: JSONL file to which skipped rows are added as source, row and reason.

    Returns:
        The usable rows with the columns of `fedsafe.types.Sample`.

    Raises:
        ValueError: If a file is missing, empty or of an unknown type, or rows cannot be used.
    """
    names = [paths] if isinstance(paths, str) else list(paths)
    if not names:
        raise ValueError("no path is given; give at least one file or hub name")
    checked = datasets.concatenate_datasets([_load_checked(name, split=split) for name in names])
    _warn_of_ignored(checked)
    samples, bad = _part_bad_rows(checked)
    if bad and on_bad_row == "error":
        raise bad_rows_error(bad, total=len(checked))
    if bad:
        report_rejected(bad, total=len(checked), rejected=rejected)
    if len(samples) == 0:
        raise no_rows_error(bad, names=names)
    return samples


def bad_rows_error(bad: Sequence[Rejected], *, total: int) -> ValueError:
    """What to raise where bad rows are not to be skipped."""
    return ValueError(
        f"{len(bad)} of {total} rows cannot be used:\n{_listed(bad)}\n"
        "Correct them, or set on_bad_row: skip to leave them out."
    )


def no_rows_error(bad: Sequence[Rejected], *, names: Sequence[str]) -> ValueError:
    """What to raise where no row is left."""
    return ValueError(f"no row of {', '.join(names)} can be used:\n{_listed(bad)}")


def iterate_file(name: str) -> Iterator[CheckedRow]:
    """Read and check the rows of a file one at a time; nothing is cached.

    Args:
        name: A file of a type that `load_samples` takes.

    Raises:
        ValueError: If the file is missing, empty or of an unknown type.
    """
    reader = _reader_of(name)
    if reader is None:
        raise ValueError(f"{name} has an unknown file type; known are {', '.join(READERS)}")
    path = _existing(name)
    empty = True
    for row in reader(path):
        empty = False
        parsed, problem = _checked(row)
        if problem is None:
            del parsed["ignored"]
            sample = cast(Sample, {**parsed, "source": name, "row": row.number})
            yield CheckedRow(cast(dict[str, Any], row.record), sample, None)
        else:
            yield CheckedRow({}, None, Rejected(name, row.number, problem))
    if empty:
        raise _empty(name)


def with_answer(record: dict[str, Any], answer: str) -> dict[str, Any]:
    """A usable row with another last answer, in whichever of the formats it is.

    No copy of the former answer is left: beside `messages` a `response` and an `output` are always
    replaced, and so is any other column with the same text.
    """
    former = _parse(record)["messages"][-1]["content"].strip()
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


def place_of(source: str, row: int) -> str:
    """Where a row stands, in words: `a.jsonl, line 3`."""
    has_lines = source.lower().endswith((".jsonl", ".jsonl.gz", ".csv"))
    return f"{source}, {'line' if has_lines else 'row'} {row}"


def _listed(bad: Sequence[Rejected]) -> str:
    lines = [f"  {place_of(each.source, each.row)}: {each.reason}" for each in bad]
    more = [f"  and {len(bad) - _NUM_SHOWN} more"] if len(bad) > _NUM_SHOWN else []
    return "\n".join(lines[:_NUM_SHOWN] + more)


def _part_bad_rows(checked: datasets.Dataset) -> tuple[datasets.Dataset, list[Rejected]]:
    is_bad = checked.data.column("problem").is_valid().to_numpy()
    bad_rows = checked.select_columns(["source", "row", "problem"]).select(np.flatnonzero(is_bad))
    bad = [Rejected(each["source"], each["row"], each["problem"]) for each in bad_rows]
    samples = checked.remove_columns(["problem", "ignored"])
    return samples.select(np.flatnonzero(~is_bad)) if bad else samples, bad


def _warn_of_ignored(checked: datasets.Dataset) -> None:
    combinations = pc.unique(checked.data.column("ignored")).drop_null().to_pylist()
    columns = sorted({column for each in combinations for column in each.split(", ")})
    if columns:
        warnings.warn(f"columns of no format are not read: {', '.join(columns)}", stacklevel=3)


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
    try:
        rows = datasets.load_dataset(name, split=split)
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
            return _parse(row.record), None
        except _BadRowError as error:
            problem = str(error)
    return dict.fromkeys(("messages", *_OPTIONAL, "ignored")), row.place + problem


def _parse(record: object) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _BadRowError(f"holds a {type(record).__name__}, not an object with named fields")
    # Null and absent mean the same: in CSV and Parquet every row has every column.
    absent = {name for name, value in record.items() if value is None}
    absent |= {name for name in _OPTIONAL if record.get(name) == ""}
    # A name that is not UTF-8 could not be reported.
    names = {name: str(name).encode(errors="replace").decode() for name in record.keys() - absent}
    fields = {names[name]: value for name, value in record.items() if name in names}
    _refuse_misspelt(fields)
    used = _format_of(fields)
    ignored = fields.keys() - {*used, "input", *_OPTIONAL}
    if "messages" in used:
        messages = _messages(fields["messages"])
        extra = {name for turn in fields["messages"] for name, value in turn.items() if value}
        ignored |= {f"messages.{name}" for name in extra - {"role", "content"}}
    else:
        prompt = _text(fields, used[0])
        if "instruction" in used and fields.get("input"):
            prompt += "\n\n" + _text(fields, "input")
        answer = _text(fields, used[1])
        messages = [Turn(role="user", content=prompt), Turn(role="assistant", content=answer)]
    return {
        "messages": messages,
        "client": _name(fields, "client"),
        "label": _label(fields),
        "category": _name(fields, "category"),
        "ignored": ", ".join(sorted(ignored)) or None,
    }


def _refuse_misspelt(fields: dict[str, Any]) -> None:
    """A column that is almost a known one; left unread, its rows would silently lack a client."""
    for name in fields.keys() - set(_KNOWN):
        (close,) = get_close_matches(name.lower(), _KNOWN, n=1, cutoff=0.8) or (None,)
        if close is not None and close not in fields:
            raise _BadRowError(f"has a column `{name}`; rename it to `{close}`, or drop it")


def _format_of(fields: dict[str, Any]) -> tuple[str, ...]:
    """Names of the required fields of the first format that the row has, complete if possible."""
    for names in _FORMATS.values():
        if fields.keys() >= set(names):
            return names
    for names in _FORMATS.values():
        missing = [name for name in names if name not in fields]
        if len(missing) < len(names):
            raise _BadRowError(f"has no `{missing[0]}` (its columns: {_shortened(fields)})")
    raise _BadRowError(
        f"is in none of the formats {', '.join(_FORMATS)}; its columns: {_shortened(fields)}"
    )


def _shortened(columns: Iterable[str]) -> str:
    """Names of columns in brief: those of a CSV without a header are its first row's text."""
    names = [n if len(n) <= _NAME_LENGTH else f"{n[:_NAME_LENGTH]}…" for n in columns]
    more = [f"and {len(names) - _NUM_SHOWN} more"] if len(names) > _NUM_SHOWN else []
    return ", ".join(names[:_NUM_SHOWN] + more) or "-"


def _kind(value: object) -> str:
    """What a value is, without its text."""
    return f"text of {len(value)} characters" if isinstance(value, str) else type(value).__name__


def _messages(turns: object) -> Conversation:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _BadRowError("`messages` is not a list of turns with `role` and `content`")
    conversation: Conversation = []
    for index, turn in enumerate(turns):
        role = turn.get("role")
        if role not in ("system", "user", "assistant"):
            raise _BadRowError(
                f"the role of turn {index} is {_kind(role)}, not system, user or assistant"
            )
        name = f"messages[{index}].content"
        content = _text({name: turn.get("content")}, name, may_be_empty=role == "system")
        conversation.append(Turn(role=role, content=content))
    if not conversation or conversation[-1]["role"] != "assistant":
        raise _BadRowError("has no answer: the last turn is not the assistant's")
    if all(turn["role"] != "user" for turn in conversation):
        raise _BadRowError("has no turn of the user")
    return conversation


def _text(fields: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise _BadRowError(f"`{name}` is {type(value).__name__}, not text")
    if not may_be_empty and not value.strip():
        raise _BadRowError(f"`{name}` is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRowError(f"`{name}` is not valid UTF-8 at character {error.start}") from error
    return value


def _name(fields: dict[str, Any], name: str) -> str | None:
    """A client or category; data sets often number them."""
    if name not in fields:
        return None
    return str(fields[name]) if type(fields[name]) is int else _text(fields, name)


def _label(fields: dict[str, Any]) -> Label | None:
    value = fields.get("label")
    if value not in (None, "safe", "unsafe"):
        raise _BadRowError(f"`label` is {_kind(value)}, not safe or unsafe")
    return cast(Label | None, value)
