"""A rank that dies or hangs in a round ends the run, which goes on from its last checkpoint."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from ranks import rank_environment, run_ranks, torchrun
from round_rows import without_seconds
from safetensors.torch import load_file

from fedsafe.cli import main
from fedsafe.federated.checkpoint import last_checkpoint
from fedsafe.federated.round_log import RoundLog

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_ROUNDS = 3
UPDATES = "--trainer.strategy.init_args.exchange=updates"

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(
    tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, conversations: Path
) -> Arguments:
    """Arguments of `fedsafe` for a run of rounds that take about a second."""
    settings = {
        "rounds": NUM_ROUNDS,
        "model": {"base": str(tiny_gpt2), "optimizer": "sgd", "learning_rate": 0.1},
        "data": {
            "path": str(conversations),
            "partition": "Natural",
            "batch_size": 3,
            "validation_share": 0.1,
        },
        "federated": {"clients_per_round": 3, "local_steps": 40, "client_drift": "Scaffold"},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    }
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(yaml.safe_dump(settings))

    def make(run_dir: Path, strategy: str | None, *others: str) -> list[str]:
        named = [REPOSITORY / "configs" / "strategy" / f"{strategy}.yaml"] if strategy else []
        configs = [part for each in (file, *named) for part in ("--config", str(each))]
        return ["fit", *configs, "--run_dir", str(run_dir), *others]

    return make


class Launched:
    """A run on two ranks that torchrun started."""

    def __init__(self, arguments: list[str], output: Path) -> None:
        self.output = output
        with output.open("w") as file:
            command = torchrun("-m", "fedsafe", *arguments)
            self.launcher = subprocess.Popen(
                command, env=rank_environment(), stdout=file, stderr=subprocess.STDOUT
            )

    def wait(self, *, seconds: float = 200) -> int:
        return self.launcher.wait(timeout=seconds)

    def wait_for_a_round(self, run_dir: Path) -> None:
        """Until the first round is over and the second one well under way."""
        deadline = time.monotonic() + 200
        while not last_checkpoint(run_dir).exists():
            assert self.launcher.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)
        time.sleep(0.3)

    def rank(self, number: int) -> psutil.Process:
        ranks = psutil.Process(self.launcher.pid).children()
        [found] = [rank for rank in ranks if rank.environ()["RANK"] == str(number)]
        return found


@contextmanager
def launched(arguments: list[str], output: Path) -> Iterator[Launched]:
    """Nothing of the run is left behind, whatever happens."""
    run = Launched(arguments, output)
    started = [psutil.Process(run.launcher.pid)]
    try:
        yield run
    finally:
        if run.launcher.poll() is None:
            started += started[0].children(recursive=True)
            for process in started:
                process.kill()
            run.launcher.wait()


def kill_in_a_round(arguments: list[str], run_dir: Path, *, rank: int) -> tuple[int, float]:
    """Exit status of the launcher, and the seconds from the kill to the end of all ranks."""
    with launched(arguments, run_dir.with_suffix(".txt")) as run:
        run.wait_for_a_round(run_dir)
        ranks = [run.rank(number) for number in (0, 1)]
        os.kill(ranks[rank].pid, signal.SIGKILL)
        killed = time.monotonic()
        status = run.wait()
        seconds = time.monotonic() - killed
        assert not any(psutil.pid_exists(each.pid) for each in ranks)
    assert len(rows(run_dir)) == 1, "the kill came in the second round"
    return status, seconds


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [without_seconds(row) for row in RoundLog(run_dir / "rounds.jsonl").read()]


def adapter(run_dir: Path) -> torch.Tensor:
    tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_clients_in_parallel_go_on_after_a_kill_on_two_ranks_and_on_one(
    arguments: Arguments, tmp_path: Path
) -> None:
    whole, killed, on_one = (tmp_path / name for name in ("whole", "killed", "on-one"))
    assert main(arguments(whole, None)) == 0
    status, seconds = kill_in_a_round(arguments(killed, "clients", UPDATES), killed, rank=1)
    assert status == 1
    assert seconds < 20
    shutil.copytree(killed, on_one)
    run_ranks("-m", "fedsafe", *arguments(killed, "clients", UPDATES, "--ckpt_path", "last"))
    assert main(arguments(on_one, None, "--ckpt_path", "last")) == 0
    for resumed in (killed, on_one):
        assert torch.equal(adapter(resumed), adapter(whole))
        assert rows(resumed) == rows(whole)


def test_ddp_goes_on_after_a_kill_on_two_ranks_and_on_one(
    arguments: Arguments, tmp_path: Path
) -> None:
    whole, killed, on_one = (tmp_path / name for name in ("whole", "killed", "on-one"))
    run_ranks("-m", "fedsafe", *arguments(whole, "ddp"))
    status, seconds = kill_in_a_round(arguments(killed, "ddp"), killed, rank=0)
    assert status == 1
    assert seconds < 20
    shutil.copytree(killed, on_one)
    run_ranks("-m", "fedsafe", *arguments(killed, "ddp", "--ckpt_path", "last"))
    assert torch.equal(adapter(killed), adapter(whole))
    assert rows(killed) == rows(whole)
    assert main(arguments(on_one, None, "--ckpt_path", "last")) == 0
    torch.testing.assert_close(adapter(on_one), adapter(whole), atol=1e-5, rtol=0)


def test_a_frozen_rank_ends_the_run_after_the_strategys_timeout(
    arguments: Arguments, tmp_path: Path
) -> None:
    run_dir = tmp_path / "frozen"
    timeout = "--trainer.strategy.init_args.timeout=0:00:15"
    with launched(arguments(run_dir, "clients", timeout), tmp_path / "frozen.txt") as run:
        run.wait_for_a_round(run_dir)
        os.kill(run.rank(1).pid, signal.SIGSTOP)
        frozen = time.monotonic()
        assert run.wait() == 1
        seconds = time.monotonic() - frozen
    assert seconds < 15 + 30 + 15, "the timeout, then torchrun's patience with what does not end"
    assert "Timed out" in (tmp_path / "frozen.txt").read_text()
