"""Runs a command that cannot outlive its owner, not even where the owner is killed with SIGKILL.

    python leash.py DESCRIPTOR COMMAND...

The descriptor is the reading end of a pipe whose other end only the owner holds: it ends with the
owner. Started by its path, for an instant start: it imports nothing but a few standard modules.
"""

import os
import select
import signal
import subprocess
import sys

GRACE_SECONDS = 8.0
"""How long the command may take to end by itself."""
_POLL_SECONDS = 0.2


def main(descriptor: int, command: list[str]) -> int:
    """Run the command; returns its exit status.

    All processes that it starts, but those that leave its process group, end with it.
    """
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    child = subprocess.Popen(command)
    while child.poll() is None:
        owner_is_gone = select.select([descriptor], [], [], _POLL_SECONDS)[0]
        if told or owner_is_gone:
            _end(child)
    os.killpg(0, signal.SIGTERM)  # what the command left behind; this process only notes it
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    os.killpg(0, signal.SIGTERM)
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)  # and this process


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
