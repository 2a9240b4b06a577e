"""A trained adapter and its base, loaded for use."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedsafe.data.chat import ensure_chat_template
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.model.adapter import read_adapter_config
from fedsafe.model.lora import load_base


def load_trained(
    adapter: Path, *, base: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base with a trained adapter on it, and the tokenizer it was trained with.

    Args:
        adapter: Folder in PEFT's format, such as `adapter/` of a run directory.
        base: Hub name or folder of the base; None takes the one that the adapter names.
        dtype: Type of the base's weights.

    Raises:
        ValueError: If the folder holds no adapter, or the base is not to be found.
    """
    name = base or base_of(adapter)
    try:
        model = load_base(name, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{error}; for another one than the adapter names, use --base") from error
    adapted = PeftModel.from_pretrained(model, adapter)
    adapted.eval()
    has_tokenizer = (adapter / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(str(adapter) if has_tokenizer else name)
    ensure_chat_template(tokenizer)
    return adapted, tokenizer


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The base with the adapter in its weights; the model given is used up.

    Raises:
        ValueError: If a merged weight is not finite.
    """
    _part_output_layer(model)
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return merged


def _part_output_layer(model: PeftModel) -> None:
    """Give the output layer weights of its own where it shares them and one side is adapted.

    Merging would change the other side with it.
    """
    base: Any = model.get_base_model()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = isinstance(head, BaseTunerLayer) or isinstance(embeddings, BaseTunerLayer)
    if adapted and head.weight is embeddings.weight:
        plain: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


def base_of(adapter: Path) -> str:
    """Name of an adapter's base, or its folder where the run directory was moved with it.

    Raises:
        ValueError: If the folder holds no adapter.
    """
    name = str(read_adapter_config(adapter)["base_model_name_or_path"])
    beside = adapter.resolve().parent / Path(name).name
    return str(beside) if not Path(name).exists() and beside.is_dir() else name
