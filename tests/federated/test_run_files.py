import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsafe.federated.run_files import client_folder, save_base_with_tokenizer
from fedsafe.model.adapter import save_adapter
from fedsafe.model.lora import load_base
from fedsafe.model.module import LoraLM


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("ada", "0003-ada"),
        ("../../evil", "0003-....evil"),
        ("b/c", "0003-bc"),
        ("..", "0003-.."),
        ("", "0003"),
        ("/", "0003"),
        ("Zoë Ω\n", "0003-Zo"),
        ("x" * 500, "0003-" + "x" * 64),
    ],
)
def test_a_client_has_a_folder_inside_its_parent(name: str, folder: str, tmp_path: Path) -> None:
    assert client_folder(3, name) == folder
    assert (tmp_path / folder).resolve().parent == tmp_path.resolve()
    (tmp_path / folder).mkdir()


def test_no_two_clients_share_a_folder() -> None:
    clients = enumerate(["a/b", "ab", "", "/", "AB", "3-a", "a"])
    folders = [client_folder(client, name).lower() for client, name in clients]
    assert all(one != other for one, other in combinations(folders, 2))


def test_a_random_base_is_written_without_its_adapter_and_named_by_it(
    tmp_path: Path, tiny_gpt2: Path
) -> None:
    shape = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    module = LoraLM("gpt2", from_config=shape, seed=7)
    module.configure_model()
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    save_base_with_tokenizer(module, tokenizer, folder=tmp_path / "base")
    save_adapter(module.peft_model, tmp_path / "adapter")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    drawn = load_base("gpt2", from_config=shape, seed=7).state_dict()
    assert written.keys() == drawn.keys()
    assert all(torch.equal(written[name], drawn[name]) for name in drawn)
    assert AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab() == tokenizer.get_vocab()
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(tmp_path / "base")
