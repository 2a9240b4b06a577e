"""Two ranks that share every step, against one process with the same batches."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from round_rows import without_seconds
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
from ddp_cases import (  # found once its folder is known
    CASES,
    RESUMED,
    federation_of,
    resume,
    run_cases,
)

pytestmark = pytest.mark.distributed


class Runs(NamedTuple):
    """Where the runs of all cases are."""

    one: Path
    two: Path
    base: Path
    path: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, conversations: Path) -> Runs:
    """Each case in one process and on two ranks."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("ddp_cases.py")
    run_ranks(script, folder / "two", tiny_gpt2, conversations)
    run_cases(folder / "one", base=tiny_gpt2, path=conversations)
    return Runs(folder / "one", folder / "two", tiny_gpt2, conversations)


def adapter_of(run: Path) -> Tensor:
    return torch.load(run / "adapter.pt", weights_only=True)


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "rounds.jsonl").read_text().splitlines()
    return [without_seconds(json.loads(line)) for line in lines]


@pytest.mark.parametrize("case", [name for name in [*CASES, RESUMED] if name != "dropout"])
def test_two_ranks_train_what_one_process_trains(runs: Runs, case: str) -> None:
    one, two = adapter_of(runs.one / case), adapter_of(runs.two / case)
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "case",
    ["fedavg", "scaffold", "fedprox", "clipped", "checkpointed", "dropout"],
)
def test_two_ranks_train_bit_for_bit_what_one_process_does_that_accumulates_two_parts(
    runs: Runs, tmp_path: Path, case: str
) -> None:
    settings = CASES[case]()
    settings["trainer"] = {"accumulate_grad_batches": 2, **settings.get("trainer", {})}
    run = federation_of(tmp_path, settings, runs.base, runs.path, None).fit()
    assert torch.equal(run.adapter, adapter_of(runs.two / case))


@pytest.mark.parametrize("case", [name for name in CASES if name != "dropout"])
def test_two_ranks_tell_the_same_story(runs: Runs, case: str) -> None:
    one, two = rows_of(runs.one / case), rows_of(runs.two / case)
    assert len(one) == len(two)
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        assert [c["client"] for c in ours["clients"]] == [c["client"] for c in theirs["clients"]]
        assert (ours["tokens"], ours["bytes_up"]) == (theirs["tokens"], theirs["bytes_up"])
        for name in ("loss", "update_norm", "adapter_norm", "val/loss"):
            if name in ours:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4)


def test_a_run_that_two_ranks_began_goes_on_in_one_process(runs: Runs, tmp_path: Path) -> None:
    checkpoint = runs.two / RESUMED / "checkpoints" / "last.ckpt"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(checkpoint.read_bytes())
    resume(tmp_path, base=runs.base, path=runs.path, strategy=None)
    torch.testing.assert_close(
        adapter_of(tmp_path), adapter_of(runs.two / RESUMED), atol=1e-5, rtol=0
    )


def test_ranks_see_different_parts_of_a_step(runs: Runs) -> None:
    """Were both to train on everything, batches of one sample would give what they do in one."""
    fedavg, single = (adapter_of(runs.two / name) for name in ("fedavg", "one_sample_steps"))
    assert not torch.allclose(fedavg, single)
