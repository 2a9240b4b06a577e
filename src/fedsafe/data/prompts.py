"""Red-team prompts, as the server asks them.

Three formats of a row: `prompt`, a text or a list of turns that ends with the user's, perhaps with
a `response` to revise; `messages`, of which everything before the first answer is asked; `chosen`
of hh-rlhf, of which likewise.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from fedsafe.data.fields import (
    BadRowError,
    fields_of,
    refuse_misspelt,
    shortened,
    text_of,
    turns_of,
    unread_in_turns,
)
from fedsafe.data.hh_rlhf import refuse_empty, turns_of_transcript
from fedsafe.data.rows import each_row, read_rows
from fedsafe.data.sources import Rejected
from fedsafe.types import Conversation, RedTeamPrompt, Turn

_FORMATS = ("prompt", "messages", "chosen")
_KNOWN = (*_FORMATS, "response")
_SILENT = {"client", "label", "category", "rejected"}
"""What may stand beside a prompt and says nothing about how it is asked."""


def load_prompts(
    paths: str | Sequence[str],
    *,
    split: str = "train",
    on_bad_row: Literal["error", "skip"] = "error",
    rejected: Path | None = None,
) -> list[RedTeamPrompt]:
    """Read red-team prompts from files or the hub.

    Args:
        paths: As for `data.sources.load_samples`.
        split: Split to take of a dataset folder or hub name.
        on_bad_row: `error` stops at rows that cannot be used and lists them; `skip` leaves them
            out and warns of their number.
        rejected: JSONL file to which skipped rows are added as source, row and reason.

    Raises:
        ValueError: If a file is missing, empty or of an unknown type, or rows cannot be used.
    """
    return read_rows(paths, _prompt, split=split, on_bad_row=on_bad_row, rejected=rejected)


def each_prompt(path: str, *, split: str = "train") -> Iterator[RedTeamPrompt | Rejected]:
    """The prompt of each row of a file or hub name, in order, or why it cannot be used.

    Raises:
        ValueError: If the file is missing, empty or of an unknown type.
    """
    return (prompt for prompt, _ in each_row(path, _prompt, split=split))


def conversation_of(fields: dict[str, Any], name: str) -> Conversation:
    """A field that holds turns, or the text of one turn of the user; ends with the user's."""
    if isinstance(fields[name], str):
        return [Turn(role="user", content=text_of(fields, name))]
    turns = turns_of(fields, name)
    if not turns or turns[-1]["role"] != "user":
        raise BadRowError(f"the last turn of `{name}` is not the user's")
    return turns


def _prompt(record: object, source: str, row: int) -> tuple[RedTeamPrompt, set[str]]:
    fields = fields_of(record, optional=("response",))
    refuse_misspelt(fields, _KNOWN)
    name = next((each for each in _FORMATS if each in fields), None)
    if name is None:
        raise BadRowError(
            f"has none of {', '.join(f'`{each}`' for each in _FORMATS)}; its columns: "
            f"{shortened(fields)}"
        )
    read = {name, "response"} if name == "prompt" else {name}
    turns = conversation_of(fields, name) if name == "prompt" else _before_answer(fields, name)
    response = text_of(fields, "response") if "response" in fields.keys() & read else None
    unread = (fields.keys() - read - _SILENT) | unread_in_turns(fields, name)
    return RedTeamPrompt(turns, response, source, row), unread


def _before_answer(fields: dict[str, Any], name: str) -> Conversation:
    is_transcript = name == "chosen" and isinstance(fields[name], str)
    turns = (turns_of_transcript if is_transcript else turns_of)(fields, name)
    asked = list(takewhile(lambda turn: turn["role"] != "assistant", turns))
    if not asked or asked[-1]["role"] != "user":
        raise BadRowError(f"`{name}` has no turn of the user before the first answer")
    if is_transcript:
        refuse_empty(asked, name)
    return asked
