"""The sides of a federation as a user would start them, each in a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread

import psutil

HERE = Path(__file__).parent


class Side:
    """`fedsafe federate server` or `client`, which ends with the test.

    Args:
        arguments: What stands behind `fedsafe federate`.
        log: File that gets what it writes.
        environment: What it finds there, beside what is in this process's.
    """

    def __init__(
        self, arguments: list[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        with log.open("ab") as written:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedsafe", "federate", *arguments],
                cwd=log.parent,
                stdout=written,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(HERE), **(environment or {})},
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, seconds: float = 120) -> None:
        """Wait until it says something."""
        until = time.monotonic() + seconds
        while words not in self.text():
            assert self.process.poll() is None, f"it ended before {words!r}: {self.text()}"
            assert time.monotonic() < until, f"it did not say {words!r}: {self.text()}"
            time.sleep(0.1)

    def wait(self, seconds: float = 300) -> int:
        """Wait until it ends; returns its exit status."""
        return self.process.wait(seconds)

    def family(self) -> list[psutil.Process]:
        """It and all that it started and that is still below it."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def find(self, words: str) -> psutil.Process:
        """The process below it whose command holds the words, but for the one that guards it."""
        found = [
            each
            for each in self.family()
            if words in " ".join(each.cmdline()) and "leash.py" not in " ".join(each.cmdline())
        ]
        assert len(found) == 1, found
        return found[0]

    def end(self) -> None:
        """End it, as a user or systemd would."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


def all_gone(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all of these end in time; a dead one that nobody has waited for counts."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(each.is_running() and each.status() != "zombie" for each in processes):
            return True
        time.sleep(0.1)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RecordingProxy:
    """Passes TCP connections on to a port, and keeps what callers send."""

    def __init__(self, port: int) -> None:
        self.sent = bytearray()
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            caller, _ = self._listener.accept()
            try:
                called = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                caller.close()
                continue
            for pair in ((caller, called, self.sent), (called, caller, bytearray())):
                Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    try:
        while data := source.recv(65536):
            kept.extend(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        source.close()
        target.close()
