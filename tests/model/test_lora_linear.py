from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from fedsafe.data.packing import Pack
from fedsafe.model import lora
from fedsafe.model.adapter import adapter_scale, save_adapter
from fedsafe.model.lora_linear import HalfLoraLinear, spare_casts
from fedsafe.model.module import LoraLM

ModuleMaker = Callable[..., LoraLM]
HALF = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)


class Layer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, dtype: torch.dtype, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(24, 40, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        return output


def adapted(dtype: torch.dtype, *, dropout: float = 0.0, bias: bool = True) -> Any:
    """A layer with an adapter that changes what it gives."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["inner"])
    model = get_peft_model(Layer(dtype, bias=bias), config)  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    spare_casts(model)
    return model


def layer_of(model: Any) -> Linear:
    layer = model.base_model.model.inner
    assert isinstance(layer, Linear)
    return layer


def exactly(model: Any, x: Tensor) -> Tensor:
    """What the layer gives, in float64."""
    layer = layer_of(model)
    base, down, up = layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]
    frozen = nn.functional.linear(
        x.double(), base.weight.double(), None if base.bias is None else base.bias.double()
    )
    return frozen + 2.0 * (x.double() @ down.weight.double().T) @ up.weight.double().T


@pytest.mark.oracle
@HALF
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_layer_gives_what_the_formula_says_to_the_rounding_of_its_type(
    dtype: torch.dtype, bias: bool
) -> None:
    model = adapted(dtype, bias=bias)
    x = torch.randn(2, 5, 24, dtype=dtype)
    found = model(x)
    expected = exactly(model, x)
    assert type(layer_of(model)) is HalfLoraLinear
    assert found.dtype == dtype
    assert found.shape == (2, 5, 40)
    assert (found.double() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.oracle
@HALF
def test_gradients_are_those_of_the_formula_and_float32(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    layer = layer_of(model)
    x = torch.randn(3, 7, 24, dtype=dtype, requires_grad=True)
    weights = torch.randn(3, 7, 40, dtype=dtype)
    parameters = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    found = torch.autograd.grad((model(x) * weights).sum(), parameters)
    expected = torch.autograd.grad((exactly(model, x) * weights.double()).sum(), parameters)
    assert [each.dtype for each in found] == [dtype, torch.float32, torch.float32]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() <= 4 * torch.finfo(dtype).eps * theirs.norm()


def test_no_input_is_cast_to_float32() -> None:
    model = adapted(torch.bfloat16)
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    assert kept
    assert all(each.dtype == torch.bfloat16 for each in kept)


def test_dropout_drops_inputs_of_the_adapter_alone() -> None:
    model = adapted(torch.bfloat16, dropout=0.5).train()
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x), model(x))
    with adapter_scale(model, 0):
        assert torch.equal(model.train()(x), layer_of(model).get_base_layer()(x))


@pytest.mark.parametrize("scale", [0, 0.5])
def test_an_adapter_that_is_off_or_scaled_is_so_here_too(scale: float) -> None:
    model = adapted(torch.bfloat16)
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    base = layer_of(model).get_base_layer()(x)
    with adapter_scale(model, scale):
        found = model(x)
    expected = base.double() + scale * (exactly(model, x) - base.double())
    assert (found.double() - expected).norm() <= 0.02 * expected.norm()


def test_a_merged_adapter_is_not_added_twice() -> None:
    model = adapted(torch.bfloat16)
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    apart = model(x)
    layer_of(model).merge()
    assert (model(x) - apart).norm() <= 0.02 * apart.norm()


def test_float32_layers_are_left_to_peft() -> None:
    assert type(layer_of(adapted(torch.float32))) is Linear


def test_a_wider_input_goes_the_way_of_peft() -> None:
    model = adapted(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(torch.ones(1, 24))
    assert found.dtype == torch.bfloat16
    expected = exactly(model, torch.ones(1, 24))
    assert (found.double() - expected).norm() <= 0.02 * expected.norm()


def test_the_adapter_file_is_that_of_peft(
    make_module: ModuleMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make_module("llama", dtype="bfloat16")
    monkeypatch.setattr(lora, "spare_casts", lambda _: None)
    theirs = make_module("llama", dtype="bfloat16")
    for module, name in ((ours, "ours"), (theirs, "theirs")):
        save_adapter(module.peft_model, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_a_model_is_as_near_to_its_exact_gradients_as_with_peft(
    make_module: ModuleMaker, packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = gradient(make_module("llama", dtype="bfloat16"), packed)
    monkeypatch.setattr(lora, "spare_casts", lambda _: None)
    theirs = gradient(make_module("llama", dtype="bfloat16"), packed)
    exact = gradient(make_module("llama"), packed)  # of weights that are not rounded
    assert not torch.equal(ours, theirs)
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def gradient(module: LoraLM, batch: Pack) -> Tensor:
    module(batch).mean().backward()
    return torch.cat([each.flatten() for each in module.flat_adapter().gradients()])
