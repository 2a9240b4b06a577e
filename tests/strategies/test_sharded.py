"""Federations whose base is split over ranks, against DDP and against one process."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sharded_runs
import torch
from federations import write_conversations
from ranks import run_ranks
from round_rows import without_seconds
from sharded_runs import ALONE, GROUPS, ONE_GROUP, RESUMED, resume
from torch import Tensor

from fedsafe.federated.checkpoint import last_checkpoint
from fedsafe.strategies.sharded import ShardedStrategy

CLIPPED_APART = 1e-6
"""Bound where clipping adds the squares of a gradient's parts in another order than DDP's."""


class Runs(NamedTuple):
    """The runs' folders by way and case, the base and the conversations."""

    folder: Path
    base: Path
    path: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> Runs:
    """Every case on two ranks, and in one process what groups should give."""
    folder = tmp_path_factory.mktemp("sharded")
    path = folder / "conversations.jsonl"
    write_conversations(path)
    run_ranks(sharded_runs.__file__, folder, tiny_gpt2, path)
    for case in GROUPS:
        sharded_runs.run(folder / "one", case, tiny_gpt2, path, None)
    return Runs(folder, tiny_gpt2, path)


def adapter_of(run: Path) -> Tensor:
    return torch.load(run / "adapter.pt", weights_only=True)


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "rounds.jsonl").read_text().splitlines()
    return [without_seconds(json.loads(line)) for line in lines]


@pytest.mark.distributed
@pytest.mark.parametrize("case", [*(each for each in ONE_GROUP if each != "clipped"), RESUMED])
def test_fsdp_trains_bit_for_bit_what_ddp_trains(runs: Runs, case: str) -> None:
    ours, expected = (runs.folder / way / case for way in ("fsdp", "ddp"))
    assert torch.equal(adapter_of(ours), adapter_of(expected))
    assert rows_of(ours) == rows_of(expected)


@pytest.mark.distributed
def test_clipping_differs_by_the_rounding_of_the_norm_alone(runs: Runs) -> None:
    ours, expected = (adapter_of(runs.folder / way / "clipped") for way in ("fsdp", "ddp"))
    torch.testing.assert_close(ours, expected, atol=CLIPPED_APART, rtol=0)
    unclipped = adapter_of(runs.folder / "fsdp" / "accumulated")
    assert not torch.allclose(ours, unclipped, atol=100 * CLIPPED_APART)


@pytest.mark.distributed
@pytest.mark.parametrize("case", GROUPS)
def test_fsdp_trains_what_one_process_trains(runs: Runs, case: str) -> None:
    ours, expected = (adapter_of(runs.folder / way / case) for way in ("fsdp", "one"))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.distributed
def test_a_run_that_was_stopped_inside_a_visit_goes_on_in_one_process(
    runs: Runs, tmp_path: Path
) -> None:
    """What two ranks remember of the adapter and the optimizer is what one process would."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(last_checkpoint(runs.folder / "fsdp" / RESUMED), last_checkpoint(tmp_path))
    resume(tmp_path, base=runs.base, path=runs.path, strategy=None)
    torch.testing.assert_close(
        adapter_of(tmp_path), adapter_of(runs.folder / "fsdp" / RESUMED), atol=1e-5, rtol=0
    )


@pytest.mark.distributed
def test_a_model_is_measured_and_trained_again_in_new_trainers(runs: Runs) -> None:
    ours, expected = (runs.folder / way / "fedavg" for way in ("fsdp", "ddp"))
    measured = [json.loads((run / "measured.json").read_text()) for run in (ours, expected)]
    assert measured[0] == measured[1] != {}
    assert torch.equal(adapter_of(ours / "more"), adapter_of(expected / "more"))
    assert not torch.equal(adapter_of(ours / "more"), adapter_of(ours))


@pytest.mark.distributed
@pytest.mark.parametrize("case", GROUPS)
def test_groups_that_exchange_updates_train_bit_for_bit_what_one_after_another_does(
    runs: Runs, case: str
) -> None:
    ours, expected = (runs.folder / way / case for way in ("updates", "one"))
    assert torch.equal(adapter_of(ours), adapter_of(expected))
    assert rows_of(ours) == rows_of(expected)


@pytest.mark.distributed
@pytest.mark.parametrize("case", GROUPS)
def test_groups_that_exchange_sums_train_it_to_rounding(runs: Runs, case: str) -> None:
    ours, expected = (adapter_of(runs.folder / way / case) for way in ("sums", "one"))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.distributed
def test_two_groups_of_two_train_bit_for_bit_what_one_group_does(runs: Runs) -> None:
    run_ranks(
        sharded_runs.__file__, runs.folder, runs.base, runs.path, num_ranks=4, timeout_seconds=400
    )
    ours, expected = (adapter_of(runs.folder / way / "fedavg") for way in ("four", "ddp"))
    assert torch.equal(ours, expected)
    assert rows_of(runs.folder / "four" / "fedavg") == rows_of(runs.folder / "ddp" / "fedavg")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "accelerator",
    [
        "cpu",
        pytest.param(
            "gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_group_of_one_rank_trains_bit_for_bit_what_one_process_does(
    tmp_path: Path, tiny_gpt2: Path, accelerator: str
) -> None:
    path = tmp_path / "conversations.jsonl"
    write_conversations(path)
    run_ranks(sharded_runs.__file__, tmp_path, tiny_gpt2, path, accelerator, num_ranks=1)
    for case in ALONE:
        ours, expected = (adapter_of(tmp_path / way / case) for way in ("alone", "plain"))
        assert torch.equal(ours, expected), case


def test_no_client_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="clients is 0; give the number to train at once"):
        ShardedStrategy(clients=0)
