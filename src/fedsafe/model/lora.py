"""The frozen base model and the LoRA adapter on it.

References:
    Hu et al. (2022), LoRA: Low-Rank Adaptation of Large Language Models.
    https://arxiv.org/abs/2106.09685
    Dettmers et al. (2023), QLoRA (the 4-bit base). https://arxiv.org/abs/2305.14314
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fedsafe.model.lora_linear import spare_casts

_ROTARY = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Names that a configuration moves into its `rope_parameters`."""

_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)


def load_base(
    base: str,
    *,
    from_config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    quantize_4bit: bool = False,
    attention: str = "sdpa",
    seed: int = 0,
) -> PreTrainedModel:
    """The base model, from the hub, from a folder, or random from a configuration.

    Args:
        base: Hub name or local folder; with `from_config`, a model type such as ``gpt2`` or
            ``llama``.
        from_config: Values of the type's configuration; builds random weights instead of loading
            any.
        dtype: Type of the weights.
        quantize_4bit: Load the weights in 4 bits (NF4, bitsandbytes); needs a CUDA device.
        attention: Name of the attention implementation.
        seed: Seed of random weights.

    Raises:
        ValueError: If the model or a name in `from_config` is unknown, or 4 bits cannot run here.
    """
    if from_config is not None and quantize_4bit:
        raise ValueError("quantize_4bit loads trained weights; it has no use with from_config")
    quantization = _four_bit_config(dtype) if quantize_4bit else None
    try:
        if from_config is not None:
            return _random_base(base, from_config, dtype=dtype, attention=attention, seed=seed)
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, attn_implementation=attention, quantization_config=quantization
        )
    except KeyError as error:  # a model with a table of its own attention classes
        if error.args != (attention,):
            raise
        raise ValueError(
            f"{base!r} has no attention {attention!r}; choose another one, such as 'eager'"
        ) from error
    except OSError as error:
        raise ValueError(
            f"no base model at {base!r}: {_first_line(error)}; give the name of a causal language "
            "model on the hub, or a folder that holds config.json and *.safetensors"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str] | str,
    seed: int = 0,
) -> PeftModel:
    """Freeze the base and put a fresh LoRA adapter on it.

    Args:
        model: The base; its modules are wrapped in place.
        rank: Rank r of the update ``alpha / r * B @ A``, >= 1.
        alpha: Scale of the update.
        dropout: Probability of dropping an input of the adapter.
        target_modules: Names (or endings) of linear modules or embeddings, or ``all-linear``.
        seed: Seed of the random A; B is zero.

    Raises:
        ValueError: If the rank is below 1, or a target module is not in the model or is an
            embedding that is the output layer too.
    """
    if rank < 1:
        raise ValueError(f"rank of the adapter is {rank}; give 1 or more")
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    _check_targets(model, targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it by r, any number will do
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # a GPU would draw other values
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    spare_casts(adapted)
    return adapted


def adaptable_module_names(model: nn.Module) -> list[str]:
    """The last parts of the names of modules that LoRA can be put on, sorted."""
    names = {name.rsplit(".", 1)[-1] for name, _ in _adaptable_modules(model)}
    return sorted(names)


def _adaptable_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, each) for name, each in model.named_modules() if isinstance(each, _ADAPTABLE)]


def _random_base(
    model_type: str, values: dict[str, Any], *, dtype: torch.dtype, attention: str, seed: int
) -> PreTrainedModel:
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(
            f"{model_type!r} is not a model type of transformers; with from_config, base is a "
            "type such as 'llama' or 'gpt2'"
        ) from error
    _check_names(values, default)
    # a type's own first and last token are those of a tokenizer that a random base does not have
    no_tokens = {"bos_token_id": None, "eos_token_id": None}
    try:
        config = AutoConfig.for_model(model_type, **no_tokens | values)
    except StrictDataclassError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"from_config does not make a {model_type}: {reason}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    assert isinstance(model, PreTrainedModel)
    return model


def _check_names(names: Iterable[str], default: PreTrainedConfig) -> None:
    """Refuse a misspelt name; transformers would keep it and build the type's default size."""
    known = {*default.to_dict(), *default.attribute_map}
    known |= set(_ROTARY) if "rope_parameters" in known else set()
    unknown = [name for name in names if name not in known]
    if unknown:
        close = get_close_matches(unknown[0], known, cutoff=0.5)
        raise ValueError(
            f"from_config has {', '.join(unknown)}, which no {default.model_type} has; "
            + (f"did you mean {' or '.join(close)}?" if close else "leave it out")
        )


def _four_bit_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise ValueError("quantize_4bit needs bitsandbytes; pip install 'fedsafe[quantization]'")
    if not torch.cuda.is_available():
        raise ValueError(
            "quantize_4bit needs a CUDA device and none is visible; leave it out to run on the CPU"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _check_targets(model: PreTrainedModel, targets: list[str] | str) -> None:
    """A name that matches nothing is an error even where others match; PEFT would pass over it."""
    if isinstance(targets, str):
        if targets != "all-linear":
            raise ValueError(f"target_modules is {targets!r}; give a list of names or 'all-linear'")
        return
    found = {
        target: [
            each for name, each in _adaptable_modules(model) if f".{name}".endswith(f".{target}")
        ]
        for target in targets
    }
    missing = [target for target, modules in found.items() if not modules]
    if missing or not targets:
        raise ValueError(
            f"target_modules {missing or targets} are not in {type(model).__name__}; it has "
            f"{', '.join(adaptable_module_names(model))}"
        )
    output: Any = model.get_output_embeddings()
    for target, modules in found.items():
        if any(isinstance(m, nn.Embedding) and m.weight is output.weight for m in modules):
            raise ValueError(
                f"target_modules has {target}, whose weights are those of the output layer too "
                "(tie_word_embeddings); leave it out, for a merged adapter would change both"
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
