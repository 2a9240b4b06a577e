import json
import shutil
from pathlib import Path

import pytest
import torch

from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.model.adapter import save_adapter
from fedsafe.model.lora import add_lora, load_base
from fedsafe.model.pretrained import load_trained

IDS = torch.arange(5, 25)[None]


@pytest.fixture
def run_dir(tmp_path: Path, tiny_gpt2: Path) -> Path:
    """A run directory with its own base and an adapter that does something."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_gpt2, folder / "base")
    model = add_lora(
        load_base(str(folder / "base")), rank=2, alpha=4, dropout=0, target_modules="all-linear"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
        model.eval()
        torch.save(model(IDS).logits, folder / "logits.pt")
    load_tokenizer(str(tiny_gpt2)).save_pretrained(folder / "adapter")
    save_adapter(model, folder / "adapter")
    return folder


def logits_of(folder: Path, **settings) -> torch.Tensor:
    model, _ = load_trained(folder / "adapter", **settings)
    assert not model.training
    with torch.no_grad():
        return model(IDS).logits


def test_the_base_is_the_one_that_the_adapter_names(run_dir: Path) -> None:
    torch.testing.assert_close(logits_of(run_dir), torch.load(run_dir / "logits.pt"))


def test_a_run_directory_can_be_moved_with_its_base(run_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    run_dir.rename(moved)
    torch.testing.assert_close(logits_of(moved), torch.load(moved / "logits.pt"))


def test_a_base_that_is_given_comes_first(run_dir: Path, tiny_gpt2: Path) -> None:
    shutil.rmtree(run_dir / "base")
    expected = torch.load(run_dir / "logits.pt")
    torch.testing.assert_close(logits_of(run_dir, base=str(tiny_gpt2)), expected)


def test_a_missing_base_is_an_error_that_names_it(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "base")
    with pytest.raises(ValueError, match=r"no base model at .*base.*; for .*, use --base"):
        load_trained(run_dir / "adapter")


def test_a_folder_without_an_adapter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no adapter_config.json; give the folder of an"):
        load_trained(tmp_path)


def test_the_tokenizer_is_the_one_it_was_trained_with(run_dir: Path) -> None:
    file = run_dir / "adapter" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_max_length": 77}))
    assert load_trained(run_dir / "adapter")[1].model_max_length == 77


def test_an_adapter_without_tokenizer_takes_that_of_its_base(run_dir: Path) -> None:
    for file in (run_dir / "adapter").glob("token*"):
        file.unlink()
    assert load_trained(run_dir / "adapter")[1].chat_template
