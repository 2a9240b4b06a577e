"""How the server's process ended, told to the command that started it through a file."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import psutil

from fedsafe.federated.flower.private_line import write_private

FILE = "outcome.json"
_PROCESS = "process"


class Outcome(NamedTuple):
    """The end of a run."""

    status: int
    """Exit status, as of any command of fedsafe."""
    error: str
    """What was wrong, in one line; empty where nothing was, or where it was said before."""

    def write(self, folder: Path) -> None:
        """Leave it in a folder, whole or not at all."""
        write_private(folder / FILE, json.dumps(self._asdict()).encode())

    @staticmethod
    def read(folder: Path) -> "Outcome | None":
        """What was left there; None as long as nothing is."""
        try:
            return Outcome(**json.loads((folder / FILE).read_text()))
        except FileNotFoundError:
            return None


def write_process(folder: Path) -> None:
    """Leave the number of this process there."""
    (folder / _PROCESS).write_text(str(os.getpid()))


def has_ended(folder: Path) -> bool:
    """Whether the process that left its number there is gone."""
    try:
        process = psutil.Process(int((folder / _PROCESS).read_text()))
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except (FileNotFoundError, ValueError):  # not there yet, or not all of it
        return False
    except psutil.NoSuchProcess:
        return True
