from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsafe.data.packing import Pack, pack
from fedsafe.model.adapter import adapter_scale
from fedsafe.model.compilation import compile_layers
from fedsafe.model.module import LoraLM

ModuleMaker = Callable[..., LoraLM]
LENGTHS = [(11, 5, 17), (8, 9), (3, 2, 5, 7), (13,), (4, 4, 4, 4, 4)]


@pytest.fixture(autouse=True)
def compiled_nothing_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def packs() -> list[Pack]:
    rng = np.random.default_rng(0)
    return [
        pack([(rng.integers(3, 64, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths])
        for lengths in LENGTHS
    ]


def gradients(module: LoraLM, packs: list[Pack]) -> Tensor:
    """Of each pack, one row each."""
    rows = []
    for batch in packs:
        module.zero_grad()
        module(batch).mean().backward()
        rows.append(torch.cat([each.flatten() for each in module.flat_adapter().gradients()]))
    return torch.stack(rows)


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_compiled_model_has_the_gradients_of_the_plain_one(
    make_module: ModuleMaker, packs: list[Pack], checkpointing: bool
) -> None:
    """Packs of other lengths, and the layers behind the first, are not compiled anew."""
    plain = make_module("llama", gradient_checkpointing=checkpointing)
    compiled = make_module("llama", gradient_checkpointing=checkpointing)
    compile_layers(compiled.peft_model, backend="aot_eager")
    gradients(compiled, packs[:1])
    once = num_graphs()
    assert once > 0
    expected = gradients(plain, packs)
    torch.testing.assert_close(gradients(compiled, packs), expected, atol=1e-6, rtol=1e-4)
    assert num_graphs() == once


@pytest.mark.slow
def test_an_adapter_can_be_switched_off_in_a_compiled_model(
    make_module: ModuleMaker, packs: list[Pack]
) -> None:
    plain, compiled = make_module("llama"), make_module("llama")
    compile_layers(compiled.peft_model, backend="aot_eager")
    with torch.no_grad():
        for scale in (1, 0, 1):
            with adapter_scale(plain.peft_model, scale), adapter_scale(compiled.peft_model, scale):
                torch.testing.assert_close(compiled(packs[0]), plain(packs[0]))


def test_the_setting_compiles_the_parts_of_each_layer(
    make_module: ModuleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def note(part: nn.Module, **settings: Any) -> None:
        compiled.append(type(part).__name__)

    monkeypatch.setattr(nn.Module, "compile", note)
    make_module("llama")
    assert not compiled
    make_module("llama", compile=True)
    assert sorted(set(compiled)) == ["LlamaAttention", "LlamaMLP", "LlamaRMSNorm"]
    assert len(compiled) == 2 * 4


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no layers that can be compiled apart; set mo"):
        compile_layers(nn.Linear(1, 1))
