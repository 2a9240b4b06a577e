"""The fields of one row and what can be wrong with them, said without the row's text."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any

from fedsafe.types import Conversation, Turn

NUM_SHOWN = 5
_NAME_LENGTH = 20


class BadRowError(Exception):
    """Says what is wrong with one row."""


def fields_of(record: object, *, optional: Collection[str] = ()) -> dict[str, Any]:
    """The fields that a row fills in: all but null ones and, of the optional ones, empty ones.

    Null and absent mean the same: in CSV and Parquet every row has every column.
    """
    if not isinstance(record, dict):
        raise BadRowError(f"holds a {type(record).__name__}, not an object with named fields")
    absent = {name for name, value in record.items() if value is None}
    absent |= {name for name in optional if record.get(name) == ""}
    # A name that is not UTF-8 could not be reported.
    names = {name: str(name).encode(errors="replace").decode() for name in record.keys() - absent}
    return {names[name]: value for name, value in record.items() if name in names}


def refuse_misspelt(fields: dict[str, Any], known: Collection[str]) -> None:
    """A column that is almost a known one; left unread, its rows would silently lack a client."""
    for name in fields.keys() - set(known):
        (close,) = get_close_matches(name.lower(), known, n=1, cutoff=0.8) or (None,)
        if close is not None and close not in fields:
            raise BadRowError(f"has a column `{name}`; rename it to `{close}`, or drop it")


def require(fields: dict[str, Any], names: Iterable[str]) -> None:
    """Columns without which a row cannot be used."""
    for name in names:
        if name not in fields:
            raise BadRowError(f"has no `{name}` (its columns: {shortened(fields)})")


def text_of(fields: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    """A field that must be text."""
    value = fields[name]
    if not isinstance(value, str):
        raise BadRowError(f"`{name}` is {type(value).__name__}, not text")
    if not may_be_empty and not value.strip():
        raise BadRowError(f"`{name}` is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"`{name}` is not valid UTF-8 at character {error.start}") from error
    return value


def turns_of(fields: dict[str, Any], name: str) -> Conversation:
    """A field that must be a list of turns, in whatever order."""
    turns = fields[name]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError(f"`{name}` is not a list of turns with `role` and `content`")
    conversation: Conversation = []
    for index, turn in enumerate(turns):
        role = turn.get("role")
        if role not in ("system", "user", "assistant"):
            raise BadRowError(
                f"the role of `{name}[{index}]` is {kind(role)}, not system, user or assistant"
            )
        place = f"{name}[{index}].content"
        content = text_of({place: turn.get("content")}, place, may_be_empty=role == "system")
        conversation.append(Turn(role=role, content=content))
    return conversation


def unread_in_turns(fields: dict[str, Any], name: str) -> set[str]:
    """What the turns of a field hold beside role and content, as `messages.name`."""
    turns = fields[name] if isinstance(fields[name], list) else []
    keys = {key for turn in turns for key, value in turn.items() if value}
    return {f"{name}.{key}" for key in keys - {"role", "content"}}


def shortened(columns: Iterable[str]) -> str:
    """Names of columns in brief: those of a CSV without a header are its first row's text."""
    names = [n if len(n) <= _NAME_LENGTH else f"{n[:_NAME_LENGTH]}…" for n in columns]
    more = [f"and {len(names) - NUM_SHOWN} more"] if len(names) > NUM_SHOWN else []
    return ", ".join(names[:NUM_SHOWN] + more) or "-"


def kind(value: object) -> str:
    """What a value is, without its text."""
    return f"text of {len(value)} characters" if isinstance(value, str) else type(value).__name__
