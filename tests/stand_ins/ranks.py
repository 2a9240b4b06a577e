"""Several ranks on this machine, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

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

    Args:
        arguments: The script and its arguments.
        num_ranks: Processes.
        timeout_seconds: After which it has failed.
        check: Whether it must end well; its output is shown if it does not.
    """
    done = subprocess.run(
        torchrun(*arguments, num_ranks=num_ranks),
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
