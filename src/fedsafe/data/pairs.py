"""Better and worse answers to the same prompts, from files or the hub.

Formats of a row: `prompt`, `chosen` and `rejected`, each a text or a list of turns, as `fedsafe
revise` and TRL write them; `chosen` and `rejected` alone, each a whole conversation, as turns or as
hh-rlhf's text; and, where no worse answer is needed, those of `data.sources.load_samples`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fedsafe.data.fields import (
    BadRowError,
    fields_of,
    refuse_misspelt,
    require,
    text_of,
    turns_of,
    unread_in_turns,
)
from fedsafe.data.hh_rlhf import refuse_empty, turns_of_transcript
from fedsafe.data.prompts import conversation_of
from fedsafe.data.rows import read_rows
from fedsafe.data.sources import parse_sample
from fedsafe.types import Conversation, PreferencePair, Turn

_FORMAT = ("prompt", "chosen", "rejected")
_TRANSCRIPT = {"init_response", "critiques", "revisions", "principle", "critic"}
_SILENT = _TRANSCRIPT | {"row", "client", "label", "category"}
"""What may stand beside a pair and says nothing about it."""


def load_pairs(
    paths: str | Sequence[str],
    *,
    need_rejected: bool,
    split: str = "train",
    on_bad_row: Literal["error", "skip"] = "error",
    rejected: Path | None = None,
) -> list[PreferencePair]:
    """Read pairs: `pairs.jsonl` of `fedsafe revise`, preference data of TRL, or plain samples.

    Args:
        paths: As for `data.sources.load_samples`.
        need_rejected: Whether rows without a worse answer (plain samples) are bad rows.
        split: Split to take of a dataset folder or hub name.
        on_bad_row: `error` stops at rows that cannot be used and lists them; `skip` leaves them
            out and warns of their number.
        rejected: JSONL file to which skipped rows are added as source, row and reason.

    Raises:
        ValueError: If a file is missing, empty or of an unknown type, or rows cannot be used:
            fields missing, chosen and rejected equal.
    """
    parse = partial(_pair, need_rejected=need_rejected)
    return read_rows(paths, parse, split=split, on_bad_row=on_bad_row, rejected=rejected)


def _pair(
    record: object, source: str, row: int, *, need_rejected: bool
) -> tuple[PreferencePair, set[str]]:
    fields = fields_of(record)
    if not need_rejected and not fields.keys() & {"chosen", "rejected"}:
        sample = parse_sample(record)
        prompt, answer = _parted(sample["messages"], "messages")
        unread = set(sample["ignored"].split(", ")) if sample["ignored"] else set()
        return PreferencePair(prompt, answer, None, source, row), unread
    refuse_misspelt(fields, _FORMAT)
    require(fields, ("chosen", "rejected") if need_rejected else ("chosen",))
    prompt, chosen = _exchange(fields, "chosen")
    worse = None
    if "rejected" in fields:
        other, worse = _exchange(fields, "rejected")
        if other != prompt:
            raise BadRowError("`chosen` and `rejected` differ before their last answers")
        if worse.strip() == chosen.strip():
            raise BadRowError("`chosen` and `rejected` are equal; nothing can be preferred")
    used = fields.keys() & set(_FORMAT)
    unread = (fields.keys() - used - _SILENT).union(*(unread_in_turns(fields, n) for n in used))
    return PreferencePair(prompt, chosen, worse, source, row), unread


def _exchange(fields: dict[str, Any], name: str) -> tuple[Conversation, str]:
    """The prompt and the answer of `chosen` or `rejected`."""
    prompt = conversation_of(fields, "prompt") if "prompt" in fields else []
    if isinstance(fields[name], str):
        if prompt:
            return prompt, text_of(fields, name)
        turns = turns_of_transcript(fields, name)
        refuse_empty(turns, name)
        return _parted(turns, name)
    turns = turns_of(fields, name)
    if not turns or turns[0]["role"] == "assistant":
        return _parted([*prompt, *turns], name)
    # Some data sets have the prompt apart and once more in each conversation.
    if turns[: len(prompt)] != prompt:
        raise BadRowError(f"`{name}` is a conversation that does not begin with `prompt`")
    return _parted(turns, name)


def _parted(turns: list[Turn], name: str) -> tuple[Conversation, str]:
    """Everything before the last turn, which is the assistant's, and that turn's text."""
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRowError(f"the last turn of `{name}` is not the assistant's")
    prompt = turns[:-1]
    if not prompt or prompt[-1]["role"] != "user":
        raise BadRowError(f"the turn before the last answer of `{name}` is not the user's")
    return prompt, turns[-1]["content"]
