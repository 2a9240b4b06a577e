"""The adapters that a run leaves in its folder, and a base that it made."""

import re
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedsafe.model.adapter import save_adapter
from fedsafe.model.lora import save_random_base

_MAX_NAME = 64


def client_folder(client: int, name: str) -> str:
    """Folder of a client: its number, so that no two share one, and what is safe of its name.

    Args:
        client: Number of the client, from 0.
        name: Its name in the data, which may be any text, a path too.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "", name)[:_MAX_NAME]
    return f"{client:04d}-{safe}" if safe else f"{client:04d}"


def save_base_with_tokenizer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, folder: Path
) -> None:
    """Write a random base, which exists nowhere else, and its tokenizer."""
    save_random_base(model, folder)
    tokenizer.save_pretrained(folder)


def save_with_tokenizer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, folder: Path
) -> None:
    """Write an adapter, and once its tokenizer."""
    if not folder.exists():
        tokenizer.save_pretrained(folder)
    save_adapter(model, folder)
