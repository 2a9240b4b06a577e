"""A guard's checkpoint: loaded for judging, and told apart from others."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerBase,
)

from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.model.generation import Model
from fedsafe.model.lora import load_base
from fedsafe.model.pretrained import base_of, load_trained, merge_adapter
from fedsafe.safety.guard_format import Loader

_WEIGHTS_AND_WORDS = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")
_DIGEST_SIZE = 16


class Checkpoint(NamedTuple):
    """A language model that judges."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    num_positions: int | None
    """Tokens that it can read; None where its configuration does not say."""


def load_language_model(
    name: str | None,
    *,
    loader: Loader,
    adapter: Path | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Checkpoint:
    """Load a guard that is a language model, with its adapter merged into its weights.

    Args:
        name: Hub name or folder; None takes the one that the adapter names.
        loader: `causal`, or `image_text` for a model that reads images too.
        adapter: Folder of a LoRA adapter in PEFT's format.
        dtype: Type of the weights.
        device: Where to put them.

    Raises:
        ValueError: If the checkpoint cannot be loaded, or an adapter is given for a model that
            reads images.
    """
    if loader == "image_text":
        if adapter is not None or name is None:
            raise ValueError(f"the adapter {adapter} cannot be put on a model that reads images")
        model, tokenizer = _load_image_text(name, dtype=dtype)
    elif adapter is not None:
        adapted, tokenizer = load_trained(adapter, base=name, dtype=dtype)
        model = merge_adapter(adapted)
    else:
        assert name is not None
        model, tokenizer = load_base(name, dtype=dtype), load_tokenizer(name)
    model.eval().requires_grad_(False).to(device)
    text_config = model.config.get_text_config()
    return Checkpoint(model, tokenizer, getattr(text_config, "max_position_embeddings", None))


def _load_image_text(name: str, *, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the guard {name!r}: {error}") from error
    tokenizer = processor.tokenizer
    if not tokenizer.chat_template:
        tokenizer.chat_template = processor.chat_template
    return model, tokenizer


def checkpoint_digest(name: str | None, adapter: Path | None) -> str:
    """Digest of a checkpoint's weights and tokenizer, without loading it.

    A folder counts by the bytes of its files, so that a checkpoint trained anew in the same place
    is another one; a hub name counts by its commit. Without a name, the adapter's base counts too.

    Raises:
        ValueError: If the checkpoint is not to be found.
    """
    parts = []
    if adapter is not None:
        if not (adapter / "adapter_config.json").is_file():
            raise ValueError(
                f"there is no adapter in {adapter}; give the adapter/ of a run directory"
            )
        parts.append(_files_digest(adapter))
        name = name or base_of(adapter)
    assert name is not None
    folder = Path(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1  # a hub name has one slash
    if is_path and not folder.is_dir():
        raise ValueError(f"there is no folder {name}, which is to hold the model; give another")
    parts.append(_files_digest(folder) if folder.is_dir() else f"{name} {_commit(name)}")
    return " ".join(parts)


def _files_digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for file in sorted(_matching(folder)):
        with file.open("rb") as opened:
            digest.update(file.name.encode())
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _matching(folder: Path) -> Iterable[Path]:
    return {file for pattern in _WEIGHTS_AND_WORDS for file in folder.glob(pattern)}


def _commit(name: str) -> str:
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot find the model {name!r}: {error}; give a hub name or a local folder"
        ) from error
    return str(config._commit_hash)
