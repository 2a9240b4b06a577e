"""What a model does that ZeRO-3 splits over two ranks, against the same model whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import STAND_INS, run_ranks
from sharded_models import CASES
from torch import Tensor

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

Found = list[dict[str, Any]]
LOOKS = ("parameters", "buffers", "adapter", "logprobs", "trained")
MORE_LOOKS = ("logprobs_of_the_base", "logprobs_at_half", "greedy", "sampled", "first", "second")
ALL_LOOKS = [(case, look) for case in CASES for look in LOOKS]
ALL_LOOKS += [(case, look) for case in CASES for look in MORE_LOOKS if case != "llama_compiled"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, tiny_llama: Path) -> Found:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("zero-models")
    script = STAND_INS / "zero_models.py"
    run_ranks(script, folder, tiny_gpt2, tiny_llama, timeout_seconds=900)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal, tensors bit for bit."""
    if isinstance(theirs, Mapping):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_same(ours[name], value)
    elif isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(("case", "look"), ALL_LOOKS)
def test_a_split_model_is_and_does_what_the_whole_one_does(
    found: Found, case: str, look: str
) -> None:
    for rank in found:
        assert_same(rank[case]["split"][look], rank[case]["whole"][look])


@pytest.mark.parametrize("case", CASES)
def test_no_rank_ever_holds_the_base(found: Found, case: str) -> None:
    for rank in found:
        held = rank[case]["held"]
        assert held["at_rest"] == 0
        assert held["parts"] == pytest.approx(held["all"] / 2, rel=1e-2)
        assert 0 < held["most"] < 0.6 * held["all"]  # a layer, of three or of one


def test_one_rank_alone_reads_the_base(found: Found) -> None:
    assert [rank["loads"] for rank in found] == [1, 0]


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_tensors_that_ranks_cannot_halve_are_read_and_written_whole(
    found: Found, stage: str
) -> None:
    """SCAFFOLD's first correction, which is zero, has read and written every gradient."""
    for rank in found:
        assert torch.equal(rank["padded"][stage], rank["padded"]["whole"])


def test_training_moved_the_adapter(found: Found) -> None:
    seen = found[0]["llama"]["split"]
    assert not torch.allclose(seen["trained"], seen["adapter"], atol=1e-3)
