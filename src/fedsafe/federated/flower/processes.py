"""Starts Flower's processes so that none of them outlives the command that started them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fedsafe.federated.flower import leash
from fedsafe.federated.flower.reachability import LOOPBACK

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}
"""Flower reports nothing home, and waits less between a message and the process that answers it."""
_END_BYTES = 16_384


class Leashed:
    """A command that ends with this process.

    Args:
        command: What to run.
        environment: What it finds in the environment, beside that of this process.
        log: File that gets what it writes, behind what is there.
        stdin: Its standard input; None for none.
    """

    def __init__(
        self,
        command: list[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        stdin: IO[Any] | int | None = None,
    ) -> None:
        self.log = log
        reading, self._lifeline = os.pipe()
        with log.open("ab") as written:
            self._process = subprocess.Popen(
                [sys.executable, leash.__file__, str(reading), *command],
                env=_environment(environment),
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=written,
                stderr=subprocess.STDOUT,
                pass_fds=(reading,),
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )
        os.close(reading)

    def poll(self) -> int | None:
        """Its exit status; None as long as it runs."""
        return self._process.poll()

    def log_end(self) -> str:
        """The last of what its log holds."""
        with self.log.open("rb") as written:
            written.seek(max(0, self.log.stat().st_size - _END_BYTES))
            return written.read().decode(errors="replace")

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log_end().strip().splitlines()
        return lines[-1].strip() if lines else "it said nothing"

    def stop(self) -> None:
        """End it and what it started; wait for that."""
        if self.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
        os.close(self._lifeline)


def _environment(others: Mapping[str, str]) -> dict[str, str]:
    """Flower starts its own commands by name: this environment's come first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **QUIET, "PATH": path, **others}


def without_proxy(host: str) -> dict[str, str]:
    """Environment in which a host and this machine are reached directly, whatever else is not.

    Flower's processes would ask a proxy of the environment for each other too.
    """
    before = [os.environ[name] for name in ("NO_PROXY", "no_proxy") if os.environ.get(name)]
    hosts = ",".join([*before, *LOOPBACK, host])
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
