"""Files of a run or a table as a page needs them; another shape is told with the file's name."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Maybe:
    """The shape of what may be left out."""

    shape: Any


Nothing = type(None)
NUMBER = (int, float, Nothing)
TEXT = (str, Nothing)
_OBJECT: Mapping[str, Any] = {}
_COUNTS = ("judged", "unsafe", "dropped", "refused", "left", "hits", "false_alarms", "misses")
_FILTERED = dict.fromkeys(_COUNTS, int)
_ROW = {"method": str, "aggregation": str}
_CAI_COSTS = ("seconds", "visits", "asked", "pairs", "sft_steps", "dpo_steps")
_CAI_TOKENS = ("tokens_generated", "tokens_read", "tokens_trained")
_CAI_VISIT = {
    **dict.fromkeys((*_CAI_COSTS, *_CAI_TOKENS), Maybe(NUMBER)),
    "dropped": Maybe({...: int}),
}

TABLE = {
    "rows": [{**_ROW, "seed": int, "metrics": _OBJECT, "seconds": Maybe(NUMBER)}],
    "summary": [
        {
            **_ROW,
            "num_seeds": int,
            "metrics": {...: {"mean": NUMBER}},
            "seconds": Maybe(NUMBER),
            "costs": Maybe(_OBJECT),
            "filter": Maybe(_OBJECT),
            "cai": Maybe(dict.fromkeys((*_CAI_COSTS, *_CAI_TOKENS), (int, float))),
        }
    ],
    "guards": Maybe([{"name": str, "stage": str}]),
    "failed": Maybe([{"run": str, "error": str}]),
    "columns": Maybe({...: str}),
    "note": Maybe(TEXT),
    "command": Maybe((list, Nothing)),
}
ROUND = {
    "round": int,
    "clients": [{"client": str, "status": str}],
    "strays": Maybe([{"client": str, "status": str}]),
    "cai": Maybe(_CAI_VISIT),
    "cai_before": Maybe(_CAI_VISIT),
    **dict.fromkeys(("seconds", "tokens", "bytes_up", "bytes_down"), (int, float)),
}
FILTER = {
    "guard": str,
    "policy": str,
    "threshold": NUMBER,
    "total": _FILTERED,
    "held_out": _FILTERED,
    "shortened": int,
    "unjudged": int,
    "clients": [{"client": str, **_FILTERED}],
}
MEASURES = {...: NUMBER}
ABOUT = {"command": Maybe((list, Nothing)), "versions": Maybe((dict, Nothing))}
TESTED = {...: {"command": list}}
RECORD = {
    "id": str,
    "scores": MEASURES,
    "category": Maybe(TEXT),
    "conversation": Maybe([{"role": str, "content": str}]),
    "details": Maybe({"chosen": Maybe(str), "rejected": Maybe(str), "words": Maybe([TEXT])}),
    "problem": Maybe(TEXT),
}
PAIR = {
    "prompt": Maybe((str, list)),
    "rejected": Maybe(TEXT),
    "chosen": Maybe(TEXT),
    "critiques": Maybe([str]),
}
"""A line without the first three is a conversation that is trained on as it is."""

_WORDS = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
_WORDS |= {bool: "true or false", Nothing: "null"}
_ABSENT = object()


def read_json(file: Path, shape: Any) -> Any:
    """The contents of a JSON file; None where there is none.

    Raises:
        ValueError: If it is no JSON, or of another shape.
    """
    if not file.exists():
        return None
    return _checked(read_text(file), shape, str(file))


def read_lines(file: Path, shape: Any) -> Iterator[Any]:
    """The objects of a JSONL file; a last line that a kill cut short is left out.

    Raises:
        ValueError: If a line is no JSON, or of another shape.
    """
    *lines, last = read_text(file).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _checked(line, shape, f"{file}, line {number}")
    if _is_whole(last):
        yield _checked(last, shape, f"{file}, line {len(lines) + 1}")


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: If it is none.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _unfit(
            str(file), f"is no UTF-8 text ({error.reason} at byte {error.start})"
        ) from None


def _checked(text: str, shape: Any, place: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _unfit(place, f"is cut off or no JSON ({error})") from None
    if (found := misfit(value, shape)) is not None:
        raise _unfit(place, f"is not as fedsafe writes it: {found}")
    return value


def _unfit(place: str, what: str) -> ValueError:
    return ValueError(
        f"{place} {what}; restore the file, or move it away: fedsafe table writes its table.json "
        "anew, and the page of a run leaves out what is missing"
    )


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Where a value is of another shape, and how; None if it fits.

    Args:
        value: As JSON has it.
        shape: A type or several; a list of one shape, for each item; or an object of shapes by
            key, where `...` is for every key. Keys that it does not name may hold anything.
        place: What to call the value.
    """
    kind = type(shape) if isinstance(shape, list | dict) else shape
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(dict.fromkeys(_WORDS[each] for each in kinds))
        return f"{place or 'it'} is {_WORDS[type(value)]}, and should be {wanted}"
    for key, inner, part in _parts(value, shape):
        if part is _ABSENT:
            return f"{place or 'it'} has no {key!r}"
        found = misfit(part, inner, f"{place}.{key}" if place else str(key))
        if found is not None:
            return found
    return None


def _parts(value: Any, shape: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Key, shape and value of everything inside."""
    if isinstance(shape, list):
        yield from ((place, shape[0], item) for place, item in enumerate(value))
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if key is ...:
                yield from ((name, inner, item) for name, item in value.items())
            elif not isinstance(inner, Maybe):
                yield key, inner, value.get(key, _ABSENT)
            elif key in value:
                yield key, inner.shape, value[key]
