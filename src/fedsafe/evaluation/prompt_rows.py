"""Read the prompts of a benchmark's public file, row by row."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from fedsafe.data.fields import fields_of, refuse_misspelt, require
from fedsafe.data.rows import read_rows
from fedsafe.evaluation.prompt_benchmark import Item


def read_items(
    path: str,
    item_of: Callable[[dict[str, Any], int], Item],
    *,
    columns: Sequence[str],
    unread: Collection[str] = (),
    split: str,
    on_bad_row: Literal["error", "skip"],
) -> list[Item]:
    """The prompts of a file or hub name.

    Args:
        path: As for `data.sources.load_samples`.
        item_of: The prompt of a row's fields and its number; raises `BadRowError`.
        columns: What every row must have.
        unread: Columns that may stand beside these and are not read; others are warned of.
        split: Split to take of a hub name.
        on_bad_row: Whether rows that cannot be used are an error.

    Raises:
        ValueError: If the file is missing or empty, or rows of it cannot be used.
    """

    def parse(record: object, source: str, row: int) -> tuple[Item, set[str]]:
        fields = fields_of(record, optional=unread)
        refuse_misspelt(fields, [*columns, *unread])
        require(fields_of(record), columns)
        return item_of(fields, row), fields.keys() - {*columns, *unread}

    return read_rows(path, parse, split=split, on_bad_row=on_bad_row, rejected=None)
