from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsafe.model.adapter import (
    adapter_scale,
    read_adapter_config,
    save_adapter,
)
from fedsafe.model.generation import generating
from fedsafe.model.module import LoraLM

ModuleMaker = Callable[..., LoraLM]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_saved_files_load_with_peft_and_give_the_same_logits(
    make_module: ModuleMaker, tmp_path: Path, family: str
) -> None:
    module = make_module(family)
    module.make_base().save_pretrained(tmp_path / "base")
    save_adapter(module.peft_model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.tensor([[5, 9, 2, 40, 3]])
    module.peft_model.get_base_model().set_attn_implementation("sdpa")
    expected = module.peft_model.eval()(ids).logits
    plain = base(ids).logits
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2), "the adapter changes nothing"


def test_saving_again_replaces_every_file_and_leaves_no_scratch(
    make_module: ModuleMaker, tmp_path: Path
) -> None:
    module = make_module("gpt2")
    save_adapter(module.peft_model, tmp_path / "adapter")
    module.flat_adapter().write(torch.full((module.flat_adapter().num_params,), 0.25))
    save_adapter(module.peft_model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors
    assert all((tensor == 0.25).all() for tensor in tensors.values())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_interrupted_save_leaves_the_old_adapter_whole(
    make_module: ModuleMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module("gpt2")
    save_adapter(module.peft_model, tmp_path / "adapter")
    before = {f.name: f.read_bytes() for f in (tmp_path / "adapter").iterdir()}

    def full_disk(tensors: object, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("fedsafe.model.adapter.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(module.peft_model, tmp_path / "adapter")
    assert {f.name: f.read_bytes() for f in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_settings_beside_an_adapter_are_read(make_module: ModuleMaker, tmp_path: Path) -> None:
    save_adapter(make_module("gpt2", rank=3).peft_model, tmp_path)
    assert read_adapter_config(tmp_path)["r"] == 3


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(
    make_module: ModuleMaker, tmp_path: Path, missing: str
) -> None:
    save_adapter(make_module("gpt2").peft_model, tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"holds no {missing}; give the folder of an adapter"):
        read_adapter_config(tmp_path)


# ---- at a share of its strength ------------------------------------------------------------------


def logits_of(model: PeftModel) -> Tensor:
    with generating(model):
        return model(torch.arange(3, 9)[None]).logits


def test_the_adapter_is_scaled_for_a_while(make_module: ModuleMaker) -> None:
    module = make_module("llama")
    adapter, model = module.flat_adapter(), module.peft_model
    whole = logits_of(model)
    with adapter_scale(model, 1):
        assert torch.equal(logits_of(model), whole)
    with adapter_scale(model, 0):
        base = logits_of(model)
    with adapter_scale(model, 0.25):
        quarter = logits_of(model)
    assert torch.equal(logits_of(model), whole)
    vector = adapter.read()
    adapter.write(torch.zeros_like(vector))
    assert torch.equal(base, logits_of(model))
    adapter.write(vector / 2)  # both factors at half are their product at a quarter
    assert torch.allclose(quarter, logits_of(model), atol=1e-5)
    assert not torch.allclose(quarter, base, atol=1e-2)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_the_adapter_is_put_back_after_an_error(
    make_module: ModuleMaker, scale: float, frozen: bool
) -> None:
    model = make_module("gpt2").peft_model
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and not frozen)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    before = logits_of(model)
    with pytest.raises(RuntimeError, match="out of memory"), adapter_scale(model, scale):
        raise RuntimeError("out of memory")
    assert torch.equal(logits_of(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


@pytest.mark.parametrize("scale", [-0.1, 1.5, float("nan")], ids=["negative", "above_1", "nan"])
def test_a_scale_is_a_share(make_module: ModuleMaker, scale: float) -> None:
    model = make_module("gpt2").peft_model
    with (
        pytest.raises(ValueError, match=f"the scale of the adapter is {scale}; give a number"),
        adapter_scale(model, scale),
    ):
        pass
