"""What both sides of `fedsafe federate` share."""

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import yaml

from fedsafe.federated.flower.node_file import Node


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


def check_configs(arguments: list[str]) -> None:
    """Refuse configuration files that cannot be read, at once: what they say is checked later.

    Args:
        arguments: Options of the training.

    Raises:
        ValueError: Names the file.
    """
    for file in Node("", arguments, str(Path.cwd())).configs():
        if not file.is_file():
            raise ValueError(f"there is no file {file}; give another --config")
        try:
            yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeError) as error:
            raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from None


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
