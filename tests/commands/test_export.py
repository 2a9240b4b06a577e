from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsafe.cli import main
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.model.adapter import save_adapter
from fedsafe.model.lora import add_lora, load_base
from fedsafe.model.pretrained import load_trained

Captured = pytest.CaptureFixture[str]
IDS = torch.arange(5, 35).view(2, 15)


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An adapter that changes what the model says."""
    base: Path = request.getfixturevalue(request.param)
    model = add_lora(load_base(str(base)), rank=4, alpha=8, dropout=0, target_modules="all-linear")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    load_tokenizer(str(base)).save_pretrained(tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def export(*arguments: str) -> int:
    return main(["export", *arguments])


@torch.no_grad()
def test_the_merged_model_gives_the_same_logits(adapter: Path, tmp_path: Path) -> None:
    assert export("--adapter", str(adapter), "--merge", str(tmp_path / "out" / "merged")) == 0
    trained, tokenizer = load_trained(adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    torch.testing.assert_close(merged(IDS).logits, trained(IDS).logits, atol=1e-5, rtol=1e-5)
    with trained.disable_adapter():
        assert (merged(IDS).logits - trained(IDS).logits).abs().max() > 1e-2
    other = AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")
    assert other("red cat")["input_ids"] == tokenizer("red cat")["input_ids"]
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["merged"]


@torch.no_grad()
def test_an_adapter_on_an_output_layer_tied_to_the_embeddings_leaves_those(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    base = load_base(str(tiny_gpt2))
    model = add_lora(base, rank=4, alpha=8, dropout=0, target_modules=["c_attn", "lm_head"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)
    save_adapter(model, tmp_path / "adapter")
    assert export("--adapter", str(tmp_path / "adapter"), "--merge", str(tmp_path / "merged")) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    trained = load_trained(tmp_path / "adapter")[0]
    torch.testing.assert_close(merged(IDS).logits, trained(IDS).logits, atol=1e-5, rtol=1e-5)


def test_an_empty_folder_is_written_to(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    arguments = ["--adapter", str(adapter), "--merge", str(tmp_path / "merged")]
    assert export(*arguments, "--dtype", "bfloat16") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16


def test_a_folder_with_files_is_refused(adapter: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep")
    assert export("--adapter", str(adapter), "--merge", str(tmp_path / "merged")) == 1
    assert "merged is not empty; give a new folder to merge into" in capsys.readouterr().err
    assert [each.name for each in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(
    adapter: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "merged").write_text("mine")
    assert export("--adapter", str(adapter), "--merge", str(tmp_path / "merged")) == 1
    assert "merged is a file; give a new folder to merge into" in capsys.readouterr().err


def test_a_missing_adapter_leaves_nothing_behind(tmp_path: Path, capsys: Captured) -> None:
    assert export("--adapter", str(tmp_path / "no"), "--merge", str(tmp_path / "merged")) == 1
    assert "holds no adapter_config.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
