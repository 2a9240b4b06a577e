"""A guard's checkpoint: its adapter against PEFT, and what tells it from others."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedsafe.model.adapter import save_adapter
from fedsafe.model.lora import add_lora, load_base
from fedsafe.safety.checkpoint import Checkpoint, checkpoint_digest, load_language_model

CPU = torch.device("cpu")
IDS = torch.arange(5, 35)[None]


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder with an adapter for a checkpoint that changes what it computes."""

    def make(base: Path, targets: Sequence[str] | str = "all-linear", *, seed: int = 0) -> Path:
        model = add_lora(load_base(str(base)), rank=2, alpha=4, dropout=0.0, target_modules=targets)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path / f"adapter-{seed}"
        save_adapter(model, folder)
        return folder

    return make


@pytest.fixture
def guard_folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """A checkpoint of one's own to change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "guard"))


def load(
    name: Path | None, adapter: Path | None = None, *, dtype: torch.dtype = torch.float32
) -> Checkpoint:
    given = str(name) if name is not None else None
    return load_language_model(given, loader="causal", adapter=adapter, dtype=dtype, device=CPU)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def retrain(folder: Path, file: str = "model.safetensors") -> None:
    """Other numbers of the same shapes, in place."""
    weights = load_file(folder / file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 0.1}, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_checkpoint_is_loaded_ready_to_judge(tiny_llama: Path, dtype: torch.dtype) -> None:
    model, tokenizer, num_positions = load(tiny_llama, dtype=dtype)
    assert not model.training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(dtype, False)}
    assert num_positions == 256
    assert tokenizer.eos_token == "</s>"


def test_the_positions_of_gpt2_are_found_too(tiny_gpt2: Path) -> None:
    assert load(tiny_gpt2).num_positions == 256


@pytest.mark.oracle
@pytest.mark.parametrize("given", [True, False], ids=["base-given", "base-named-by-adapter"])
@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_llama"])
def test_an_adapter_is_merged_into_what_peft_computes_unmerged(
    request: pytest.FixtureRequest, adapter: Callable[..., Path], family: str, given: bool
) -> None:
    base = request.getfixturevalue(family)
    folder = adapter(base)
    apart = AutoModelForCausalLM.from_pretrained(base).eval()
    before = logits(apart)
    expected = logits(PeftModel.from_pretrained(apart, folder))
    merged = load(base if given else None, folder).model
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2


@pytest.mark.oracle
def test_an_adapted_output_layer_that_shares_its_weights_is_merged_apart(
    tiny_gpt2: Path, adapter: Callable[..., Path]
) -> None:
    folder = adapter(tiny_gpt2, ["lm_head", "c_attn"])
    base = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    assert base.lm_head.weight is base.transformer.wte.weight
    embeddings = base.transformer.wte.weight.detach().clone()
    expected = logits(PeftModel.from_pretrained(base, folder))
    merged: Any = load(None, folder).model
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert torch.equal(merged.transformer.wte.weight, embeddings)
    assert not torch.allclose(merged.lm_head.weight, embeddings)


def test_an_adapter_whose_weights_are_no_numbers_is_refused(
    tiny_llama: Path, adapter: Callable[..., Path]
) -> None:
    folder = adapter(tiny_llama)
    weights = load_file(folder / "adapter_model.safetensors")
    broken = {name: tensor * torch.nan for name, tensor in weights.items()}
    save_file(broken, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        load(tiny_llama, folder)


def test_a_model_that_reads_images_takes_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter .*a cannot be put on a model that reads image"):
        load_language_model(
            "any", loader="image_text", adapter=tmp_path / "a", dtype=torch.float32, device=CPU
        )


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ("causal", "no base model at .*nowhere"),
        ("image_text", "cannot load the guard .*nowhere"),
    ],
)
def test_a_missing_checkpoint_is_named(tmp_path: Path, loader: Any, message: str) -> None:
    name = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=message):
        load_language_model(name, loader=loader, adapter=None, dtype=torch.float32, device=CPU)


# ---- what tells checkpoints apart ----------------------------------------------------------------


def test_a_checkpoint_is_known_by_its_bytes_wherever_it_lies(
    guard_folder: Path, tiny_llama: Path
) -> None:
    assert checkpoint_digest(str(guard_folder), None) == checkpoint_digest(str(tiny_llama), None)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json", "chat_template.jinja"])
def test_a_changed_word_makes_another_checkpoint(guard_folder: Path, file: str) -> None:
    (guard_folder / "chat_template.jinja").write_text("one")
    before = checkpoint_digest(str(guard_folder), None)
    (guard_folder / file).write_text((guard_folder / file).read_text() + " ")
    assert checkpoint_digest(str(guard_folder), None) != before


def test_weights_trained_anew_in_place_make_another_checkpoint(guard_folder: Path) -> None:
    before = checkpoint_digest(str(guard_folder), None)
    size = (guard_folder / "model.safetensors").stat().st_size
    retrain(guard_folder)
    assert (guard_folder / "model.safetensors").stat().st_size == size
    assert checkpoint_digest(str(guard_folder), None) != before


def test_weights_in_the_old_format_count_too(guard_folder: Path) -> None:
    (guard_folder / "model.safetensors").rename(guard_folder / "pytorch_model.bin")
    before = checkpoint_digest(str(guard_folder), None)
    (guard_folder / "pytorch_model.bin").write_bytes(b"others")
    assert checkpoint_digest(str(guard_folder), None) != before


def test_an_adapter_and_the_base_that_it_names_are_part_of_the_digest(
    guard_folder: Path, adapter: Callable[..., Path]
) -> None:
    folder = adapter(guard_folder)
    digests = [
        checkpoint_digest(str(guard_folder), None),
        checkpoint_digest(None, folder),
        checkpoint_digest(None, adapter(guard_folder, seed=1)),
    ]
    retrain(folder, "adapter_model.safetensors")
    digests.append(checkpoint_digest(None, folder))
    retrain(guard_folder)
    digests.append(checkpoint_digest(None, folder))
    assert len(set(digests)) == len(digests)
    assert checkpoint_digest(str(guard_folder), folder) == digests[-1]


def test_what_is_not_there_has_no_digest(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no adapter in .*; give the adapter/ of a run"):
        checkpoint_digest(str(tiny_llama), tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere, which is to"):
        checkpoint_digest(str(tmp_path / "nowhere"), None)
