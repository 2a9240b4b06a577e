"""What both sides of `fedsafe federate` share."""

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class SideParser(argparse.ArgumentParser):
    """Parser of one side's own options; what it does not know is for the training.

    Args:
        side: `server` or `client`.
        description: What the side does.
        others: Which options it takes besides its own.
    """

    def __init__(self, side: str, description: str, others: str) -> None:
        super().__init__(
            prog=f"fedsafe federate {side}",
            description=description,
            epilog=others,
            allow_abbrev=False,
        )


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what is inside like Ctrl-C: everything that was started is taken down."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
