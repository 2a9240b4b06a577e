"""Read all rows of some sources into a list, for data that are few: prompts and pairs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from fedsafe.data.fields import BadRowError
from fedsafe.data.readers import Row
from fedsafe.data.sources import (
    Rejected,
    account_for,
    iterate_rows,
    names_of,
    warn_of_ignored,
)

Item = TypeVar("Item")
Parse = Callable[[object, str, int], tuple[Item, set[str]]]
"""What a record, its source and its row give: an item, and the columns that were not read."""


def read_rows(
    paths: str | Sequence[str],
    parse: Parse[Item],
    *,
    split: str,
    on_bad_row: Literal["error", "skip"],
    rejected: Path | None,
) -> list[Item]:
    """The items of the usable rows, one source after the other.

    Args:
        paths: As for `data.sources.load_samples`, and so are the settings below.
        parse: Raises `BadRowError` where a row cannot be used.
        split: Split to take of a dataset folder or hub name.
        on_bad_row: Whether rows that cannot be used are an error.
        rejected: JSONL file to which skipped rows are added.

    Raises:
        ValueError: If a source cannot be read, or rows cannot be used.
    """
    names = names_of(paths)
    items: list[Item] = []
    bad: list[Rejected] = []
    unread: set[str] = set()
    for name in names:
        for item, columns in each_row(name, parse, split=split):
            unread |= columns
            if isinstance(item, Rejected):
                bad.append(item)
            else:
                items.append(item)
    warn_of_ignored(unread)
    total = len(items) + len(bad)
    account_for(bad, names=names, total=total, on_bad_row=on_bad_row, rejected=rejected)
    return items


def each_row(
    name: str, parse: Parse[Item], *, split: str
) -> Iterator[tuple[Item | Rejected, set[str]]]:
    """What each row of a source gives, in order: its item, or why it has none.

    Raises:
        ValueError: If the source cannot be read.
    """
    for row in iterate_rows(name, split=split):
        try:
            yield _parsed(row, parse, source=name)
        except BadRowError as error:
            yield Rejected(name, row.number, f"{row.place}{error}"), set()


def _parsed(row: Row, parse: Parse[Item], *, source: str) -> tuple[Item, set[str]]:
    if row.problem is not None:
        raise BadRowError(row.problem)
    return parse(row.record, source, row.number)
