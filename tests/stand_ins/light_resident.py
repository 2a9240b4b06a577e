"""A resident trainer without a model: `python light_resident.py NODE_FILE`; starts in an instant.

A letter's facts say what it does: `die`, `sleep` (seconds), `fail`; it answers with its number.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fedsafe.federated.flower.node_file import Node
from fedsafe.federated.flower.private_line import Entrance, folder_for
from fedsafe.federated.flower.resident_call import CANNOT_START, KEY, SOCKET
from fedsafe.federated.flower.resident_loop import serve
from fedsafe.federated.remote.letter import Letter


def answer(letter: Letter, is_wanted: Callable[[], bool]) -> Letter:
    facts = letter.facts
    marker = Path(str(facts.get("once", os.devnull)))
    if "once" in facts and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if facts.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if facts.get("freeze"):
        os.kill(os.getpid(), signal.SIGSTOP)
    end = time.monotonic() + facts.get("sleep", 0)
    while time.monotonic() < end and is_wanted():
        time.sleep(0.01)
    return Letter({"kind": "echo", "process": os.getpid(), "said": facts}, letter.tensors)


def main(node_file: Path) -> None:
    node = Node.read(node_file)
    if "fail" in node.arguments:
        sys.stderr.write(f"much ado\n{CANNOT_START}there is no base\nand more\n")
        sys.exit(1)
    if "crash" in node.arguments:
        raise ZeroDivisionError("of the crash")
    if "slow" in node.arguments:
        time.sleep(1.0)
    folder = folder_for(node_file)
    entrance = Entrance(folder / SOCKET, (folder / KEY).read_bytes())
    serve(entrance, answer, idle_seconds=node.idle_seconds)
    entrance.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
