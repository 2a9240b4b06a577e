"""Red-team prompts, as the server asks them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fedsafe.types import RedTeamPrompt


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
    raise NotImplementedError
