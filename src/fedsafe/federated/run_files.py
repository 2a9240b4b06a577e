"""The adapters that a run leaves in its folder, and a base that it made."""

import re
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedsafe.model.adapter import save_adapter
from fedsafe.model.module import LoraLM

_MAX_NAME = 64


def client_folder(client: int, name: str) -> str:
    """Folder of a client: its number, so that no two share one, and what is safe of its name.

    Args:
        client: Number of the client, from 0.
        name: Its name in the data, which may be any text, a path too.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "", name)[:_MAX_NAME]
    return f"{client:04d}-{safe}" if safe else f"{client:04d}"


def own_adapters(adapters: Mapping[int, Tensor], names: Mapping[int, str]) -> dict[str, Tensor]:
    """The adapters of clients that go on alone, by the folders that they are kept in.

    Args:
        adapters: By client, those that there are.
        names: Names of the clients that are wanted.
    """
    wanted = {client: name for client, name in names.items() if client in adapters}
    return {f"adapters/{client_folder(k, name)}": adapters[k] for k, name in wanted.items()}


def save_base_with_tokenizer(
    module: LoraLM, tokenizer: PreTrainedTokenizerBase, *, folder: Path
) -> None:
    """Write a random base, which exists nowhere else, and its tokenizer; adapters then name it."""
    module.make_base().save_pretrained(folder)  # anew: the strategy may keep its own in parts
    tokenizer.save_pretrained(folder)
    for config in module.peft_model.peft_config.values():
        config.base_model_name_or_path = str(folder)


def save_adapters(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Mapping[Path, Mapping[str, Tensor]],
) -> None:
    """Write adapters, and once the tokenizer of each.

    Args:
        model: Gives their settings.
        tokenizer: Their tokenizer.
        adapters: By folder, the values of each by the names of the model's parameters.
    """
    for folder, tensors in adapters.items():
        if not folder.exists():
            tokenizer.save_pretrained(folder)
        save_adapter(model, folder, tensors=tensors)
