"""What a server tells the person at its console, some of it in words that came from elsewhere."""

import sys

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

_LONGEST = 300


def say(text: str) -> None:
    """One line, above the progress bar if there is one."""
    Tqdm.write(f"federation: {text}", file=sys.stderr)


def shown(text: str) -> str:
    """What came from another machine, fit for a terminal and a record: one short, plain line."""
    plain = "".join(c if c.isprintable() else "?" for c in text[: _LONGEST + 1])
    return plain if len(plain) <= _LONGEST else plain[:_LONGEST] + "…"
