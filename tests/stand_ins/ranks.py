"""Several ranks on this machine, as torchrun starts them."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from warm import end, start_python

STAND_INS = Path(__file__).parent


def torchrun(*arguments: object, num_ranks: int = 2) -> list[str]:
    """The command that starts a script, or `-m` and a module, on several ranks.

    Each call finds a free port of its own.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={num_ranks}", *map(str, arguments)]


def rank_environment() -> dict[str, str]:
    """The environment of each rank: one thread, the stand-ins at hand."""
    paths = [str(STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run_ranks(
    *arguments: object, num_ranks: int = 2, timeout_seconds: float = 240, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m` and a module, on several ranks; each has one thread.

    They are told what torchrun would tell them, and as under torchrun the first that fails ends the
    others.

    Args:
        arguments: The script and its arguments.
        num_ranks: Processes.
        timeout_seconds: After which it has failed.
        check: Whether it must end well; its output is shown if it does not.
    """
    shared = {
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _free_port(),
        "TORCHELASTIC_RUN_ID": "ranks",
    }
    deadline = time.monotonic() + timeout_seconds
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"rank {rank}" for rank in range(num_ranks)]
        ranks = []
        try:
            for rank, file in enumerate(files):
                told = {
                    name: str(value)
                    for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()
                }
                ranks.append(start_python(*arguments, output=file, env=rank_environment() | told))
            while None in (ends := [rank.poll() for rank in ranks]) and not any(ends):
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired([*arguments], timeout_seconds)
                time.sleep(0.02)
        finally:
            end(ranks)
        output = "\n".join(file.read_text() for file in files)
    status = int(any(ends))
    if check and status:
        raise AssertionError(f"exit statuses {ends}\n{output}")
    return subprocess.CompletedProcess([*arguments], status, output)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
