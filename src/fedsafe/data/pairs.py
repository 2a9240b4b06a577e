"""Better and worse answers to the same prompts, from files or the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fedsafe.types import PreferencePair


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
    raise NotImplementedError
