"""Models that FSDP2 splits over two ranks are, and do, what the whole model is and does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sharded_models
import torch
from peft import PeftModel
from ranks import run_ranks
from sharded_models import CASES, samples
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedsafe.model.module import LoraLM
from fedsafe.model.sharded_adapter import ShardedAdapter
from fedsafe.model.sharded_load import decoder_layers

RANKS = (0, 1)
ROUNDED = 1e-6
"""Bound where a sum is taken in another order."""


class Runs(NamedTuple):
    """What both ranks saw, and the folder of the adapters that they wrote."""

    seen: list[dict[str, Any]]
    folder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, tiny_llama: Path) -> Runs:
    folder = tmp_path_factory.mktemp("sharded-models")
    run_ranks(sharded_models.__file__, folder, tiny_gpt2, tiny_llama)
    return Runs([torch.load(folder / f"rank{n}.pt", weights_only=False) for n in RANKS], folder)


def assert_same(ours: Any, expected: Any, what: str) -> None:
    """Equal, tensors bit for bit and in type, at any depth."""
    if isinstance(expected, Tensor):
        assert ours.dtype == expected.dtype, what
        assert torch.equal(ours, expected), what
    elif isinstance(expected, dict):
        assert ours.keys() == expected.keys(), what
        for name in expected:
            assert_same(ours[name], expected[name], f"{what} {name}")
    else:
        assert ours == expected, what


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", RANKS)
def test_a_split_model_is_bit_for_bit_the_whole_one(runs: Runs, rank: int, case: str) -> None:
    """Parameters, buffers, losses, gradients, answers, optimizer: all that the script looked at."""
    seen = runs.seen[rank][case]
    assert {"parameters", "buffers", "nll", "gradient"} <= seen["whole"].keys()
    assert_same(seen["split"], seen["whole"], case)


@pytest.mark.distributed
@pytest.mark.parametrize("when", ["held", "held_later"])
@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_about_half(runs: Runs, case: str, when: str) -> None:
    held = [seen[case][when] for seen in runs.seen]
    assert sum(each["mine"] for each in held) == held[0]["all"]  # nothing twice
    assert all(each["mine"] <= 0.52 * each["all"] for each in held)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", RANKS)
def test_one_layer_at_a_time_is_whole(runs: Runs, rank: int, case: str) -> None:
    assert runs.seen[rank][case]["layers"] == 1


@pytest.mark.distributed
@pytest.mark.parametrize("rank", RANKS)
def test_what_is_to_be_compiled_is_so_on_every_rank(runs: Runs, rank: int) -> None:
    assert runs.seen[rank]["llama_compiled"]["compiled"]
    assert not runs.seen[rank]["llama"]["compiled"]


@pytest.mark.distributed
@pytest.mark.parametrize("rank", RANKS)
def test_the_ranks_of_a_group_wait_as_long_as_they_are_told(runs: Runs, rank: int) -> None:
    assert runs.seen[rank]["waited"] == 2 * 3600


@pytest.mark.distributed
@pytest.mark.parametrize("rank", RANKS)
def test_an_adapter_is_read_back_into_a_split_model(runs: Runs, rank: int) -> None:
    assert runs.seen[rank]["reloaded"]


@pytest.mark.distributed
def test_the_optimizer_moves_to_a_whole_model_and_goes_on(runs: Runs) -> None:
    """A checkpoint that was written under FSDP2 resumes in one process."""
    seen = runs.seen[0]["llama"]["split"]
    module = LoraLM(rank=4, alpha=8.0, learning_rate=1e-2, **CASES["llama"])
    module.configure_model()
    adapter, optimizer = module.flat_adapter(), module.configure_optimizers()
    module(samples()).sum().backward()
    adapter.write(seen["stepped"])
    adapter.load_optimizer_state(optimizer, seen["moments"])
    adapter.write_gradient(2 * seen["gradient"])
    optimizer.step()
    assert torch.equal(adapter.read(), seen["later"])
    assert seen["forgotten"] == {}


@pytest.mark.distributed
@pytest.mark.parametrize("rank", RANKS)
def test_the_adapter_of_a_split_model_loads_in_peft(
    runs: Runs, tiny_llama: Path, rank: int
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(base, runs.folder / f"adapter{rank}")
    trained = runs.seen[0]["llama_folder"]["split"]["later"]
    adapted = LoraLM(str(tiny_llama), rank=4, alpha=8.0)
    adapted.configure_model()
    adapted.flat_adapter().write(trained)
    ids = samples().input_ids[:, :9]
    with torch.no_grad():
        expected = adapted.peft_model(ids, segment_lengths=[9]).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("clients", "2 ranks cannot form 3 groups of one size; start a multiple of 3 ranks"),
        ("base", "no base model at 'no/such/folder'"),
        ("4bit", "quantize_4bit packs weights in a form that cannot be split over ranks"),
    ],
)
def test_every_rank_is_told_what_cannot_be(runs: Runs, rank: int, what: str, match: str) -> None:
    assert match in runs.seen[rank]["refusals"][what]


def test_a_model_that_was_built_whole_is_refused(make_module: Callable[..., LoraLM]) -> None:
    with pytest.raises(ValueError, match="built under another strategy; give the Trainer a new"):
        ShardedAdapter(make_module("gpt2").named_parameters())


def test_the_layers_are_the_list_that_holds_most() -> None:
    def layer() -> nn.Module:  # with experts, a longer list inside of it
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(5))})

    heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(7))
    layers = nn.ModuleList(layer() for _ in range(2))
    assert decoder_layers(nn.ModuleDict({"heads": heads, "layers": layers})) is layers
