"""Python processes that begin with their imports done: forks of one that has imported much.

To import it takes every new process many seconds, where what it does then takes one or two. A fork
cannot use a GPU: on a machine that has one, processes begin anew.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_IMPORTED = (
    "deepspeed",
    "fedsafe.commands.training",
    "fedsafe.federated.rounds",
    "fedsafe.strategies.client_parallel",
    "fedsafe.strategies.sharded",
    "fedsafe.strategies.zero",
    "peft.tuners.lora.model",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
"""What is missing is passed over."""

FORKS = multiprocessing.get_context("forkserver")
"""Makes processes like these."""

FORKS.set_forkserver_preload(list(_IMPORTED))


class _Fork:
    """A fork, with what is used of `subprocess.Popen`."""

    def __init__(self, arguments: list[str], env: dict[str, str], files: list[str]) -> None:
        given = (arguments, env, str(Path.cwd()), files)
        self._process = FORKS.Process(target=_become, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return status

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


Started = _Fork | subprocess.Popen[bytes]


def start_python(
    *arguments: object,
    output: Path,
    errors: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Started:
    """Start a script, or `-m` and a module; the caller sees to its end.

    Args:
        arguments: As Python's own.
        output: The file to write its output to.
        errors: The same for what it complains of; None is the same file.
        env: Its whole environment; None is that of this process.
    """
    given, environment = [*map(str, arguments)], dict(os.environ if env is None else env)
    files = [str(output), str(errors or output)]
    if not torch.cuda.is_available():
        return _Fork(given, environment, files)
    with open(files[0], "ab") as out, open(files[1], "ab") as err:  # noqa: PTH123
        return subprocess.Popen([sys.executable, *given], env=environment, stdout=out, stderr=err)


def run_python(
    *arguments: object, env: Mapping[str, str] | None = None, timeout_seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m` and a module, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        started = start_python(*arguments, output=output, errors=errors, env=env)
        try:
            status = started.wait(timeout_seconds)
        finally:
            end([started])
        texts = [file.read_text() for file in (output, errors)]
    return subprocess.CompletedProcess([*arguments], status, *texts)


def end(processes: Sequence[Started]) -> None:
    """Kill whatever still runs."""
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def _become(arguments: list[str], env: dict[str, str], folder: str, files: list[str]) -> None:
    """Make of a fork what Python started anew would be."""
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), stream)
    os.chdir(folder)
    gc.freeze()  # else each collection looks at all that was imported; DeepSpeed collects often
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    paths = [*filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if arguments[0] == "-m":
        sys.argv, sys.path[:0] = arguments[1:], [folder, *paths]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = arguments, [str(Path(arguments[0]).parent), *paths]
        runpy.run_path(arguments[0], run_name="__main__")
