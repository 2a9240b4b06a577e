"""Pairs of a better and a worse answer, as the HHH benchmark has them."""

from typing import Literal, NamedTuple

from fedsafe.data.fields import BadRowError, fields_of, refuse_misspelt, require, shortened, text_of
from fedsafe.data.hh_rlhf import refuse_empty, turns_of_transcript
from fedsafe.data.rows import read_rows
from fedsafe.types import Conversation

CATEGORIES = ("harmless", "helpful", "honest", "other")
COLUMNS = ("category", "query", "chosen", "rejected")


class Pair(NamedTuple):
    """A better and a worse answer to one query."""

    row: int
    """Line or row in the source."""
    category: str
    query: str
    """What is asked, perhaps a whole transcript that begins with the user's words."""
    turns: Conversation
    """The same, its turns apart."""
    chosen: str
    """The better answer."""
    rejected: str
    """The worse answer."""

    @property
    def answers(self) -> tuple[str, str]:
        """The better answer and the worse one."""
        return self.chosen, self.rejected


def load_pairs(
    path: str, *, split: str, on_bad_row: Literal["error", "skip"] = "error"
) -> list[Pair]:
    """Read the pairs of a file or hub name.

    Args:
        path: As for `data.sources.load_samples`.
        split: Split to take of a hub name.
        on_bad_row: `error` stops at rows that cannot be used and lists them; `skip` leaves them
            out and warns of their number.

    Raises:
        ValueError: If the file is missing or empty, or rows of it cannot be used.
    """
    return read_rows(path, _pair, split=split, on_bad_row=on_bad_row, rejected=None)


def _pair(record: object, source: str, row: int) -> tuple[Pair, set[str]]:
    fields = fields_of(record)
    refuse_misspelt(fields, COLUMNS)
    require(fields, COLUMNS)
    category, query, chosen, rejected = (text_of(fields, name) for name in COLUMNS)
    if category not in CATEGORIES:
        raise BadRowError(
            f"`category` is {shortened([category])}, not one of {', '.join(CATEGORIES)}"
        )
    if chosen == rejected:
        raise BadRowError("`chosen` and `rejected` are equal; nothing can be preferred")
    pair = Pair(row, category, query, _turns_of_query(query), chosen, rejected)
    return pair, fields.keys() - set(COLUMNS)


def _turns_of_query(query: str) -> Conversation:
    """The turns of a query, which may go on as a transcript behind its first turn."""
    turns = turns_of_transcript({"query": f"\n\nHuman: {query}"}, "query")
    refuse_empty(turns, "query")
    if turns[-1]["role"] != "user":
        raise BadRowError("the last turn of `query` is not the user's")
    return turns
