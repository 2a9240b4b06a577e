"""A folder that one process at a time works in."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.2


@contextmanager
def only_here(
    folder: Path, *, who: str, option: str, patience_seconds: float = 0.0
) -> Iterator[None]:
    """Keep a folder, which is made if need be, for this process until it, or the block, ends.

    Args:
        folder: What to keep.
        who: What kind of process wants it, for the message.
        option: The option that names another folder, for the message.
        patience_seconds: How long to wait for a process that is just ending.

    Raises:
        ValueError: If another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + patience_seconds
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= ends_at:
                    raise ValueError(
                        f"another {who} is at work in {folder}; wait for it, or give another "
                        f"{option}"
                    ) from None
                time.sleep(_POLL_SECONDS)
        yield
