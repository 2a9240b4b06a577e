"""Rows of like length, so that little is padded."""

from collections.abc import Iterator, Sequence


def of_like_length(
    lengths: Sequence[int], *, max_rows: int, max_padding: int, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Places of rows of like length, from the shortest to the longest.

    Args:
        lengths: Tokens of each row.
        max_rows: Rows that go together.
        max_padding: Tokens that may be missing for all of them to be as long as the longest.
        max_tokens: Tokens of all together, padding counted; a longer row is alone.
    """
    group: list[int] = []
    tokens = 0
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = lengths[place] * (len(group) + 1)
        full = len(group) == max_rows or (max_tokens is not None and padded > max_tokens)
        if group and (full or padded - tokens - lengths[place] > max_padding):
            yield group
            group, tokens = [], 0
        group.append(place)
        tokens += lengths[place]
    if group:
        yield group
