"""An adapter's strength, and its files in PEFT's own format."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsafe.model.flat_adapter import FlatAdapter, WholeAdapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_OTHER_SCALES = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
"""Settings of PEFT that make an adapter's update other than alpha / rank * B @ A."""


@contextmanager
def adapter_scale(model: PeftModel, scale: float) -> Iterator[None]:
    """The adapter at a share of its strength, ``W + scale * alpha / r * B @ A``, for a while.

    Args:
        model: Its LoRA layers are changed and, at the end or after an error, put back.
        scale: 1 leaves the adapter as it is, 0 turns it off.

    Raises:
        ValueError: If the scale is not between 0 and 1.
    """
    if not 0 <= scale <= 1:  # nor NaN
        raise ValueError(
            f"the scale of the adapter is {scale}; give a number from 0 (off) to 1 (as it is)"
        )
    if scale == 1:
        yield
    elif scale > 0:
        with rescale_adapter_scale(model, scale):
            yield
    else:
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        try:
            with model.disable_adapter():
                yield
        finally:
            for parameter, required in trainable:  # PEFT makes all of the adapter trainable
                parameter.requires_grad_(required)


def save_adapter(
    model: PeftModel, directory: Path, *, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write an adapter in PEFT's format; each file appears whole or not at all.

    PEFT's own `save_pretrained` renders a model card besides, which costs more than all the rest.

    Args:
        model: Gives the adapter's settings and, without `tensors`, its values.
        directory: Folder of the adapter.
        tensors: The values by the names of the model's parameters, for a model that this process
            holds in part only.

    Raises:
        ValueError: If a tensor is empty, as those of a model that is split over processes are.
    """
    if tensors is None:
        # "auto" would ask the model hub whether the vocabulary changed
        named = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        named = {_name_in_file(name): tensor for name, tensor in tensors.items()}
    empty = [name for name, tensor in named.items() if not tensor.numel()]
    if empty or not named:
        raise ValueError(
            f"the adapter for {directory} would be saved without values: {len(empty)} of "
            f"{len(named)} tensors are empty; gather them from all processes first"
        )
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    directory.mkdir(parents=True, exist_ok=True)
    config = copy(model.peft_config["default"])
    config.inference_mode = True  # as PEFT writes it: loaded adapters are frozen unless asked for
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".adapter-") as scratch:
        save_file(kept, Path(scratch) / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            file.replace(directory / file.name)


def read_adapter_config(directory: Path) -> dict[str, object]:
    """The settings that PEFT wrote beside an adapter.

    Raises:
        ValueError: If the directory holds no adapter in PEFT's format.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(
                f"{directory} holds no {name}; give the folder of an adapter in PEFT's format"
            )
    config = json.loads((directory / CONFIG).read_text())
    assert isinstance(config, dict)
    return config


def load_adapter(model: PeftModel, directory: Path, *, access: FlatAdapter | None = None) -> None:
    """Overwrite the model's adapter with one in PEFT's format.

    Args:
        model: Gives the settings that the adapter must share.
        directory: Folder of the adapter.
        access: How the adapter is written; None for a model that this process holds whole.

    Raises:
        ValueError: If the directory holds no adapter, or one of another shape, of other modules, or
            whose scale is not alpha / rank throughout.
    """
    saved = read_adapter_config(directory)
    own = model.peft_config["default"]
    for name, setting in (("r", "rank"), ("lora_alpha", "alpha")):
        if saved.get(name) != getattr(own, name):
            raise ValueError(
                f"the adapter in {directory} has {setting} {saved.get(name)} and model.{setting} "
                f"is {getattr(own, name)}; give the adapter's"
            )
    for name in _OTHER_SCALES:
        if saved.get(name):
            raise ValueError(
                f"the adapter in {directory} was made with {name}, which fedsafe's adapters have "
                "not; merge it into its base, and test that"
            )
    tensors = load_file(directory / WEIGHTS)
    access = access or WholeAdapter(model.named_parameters())
    expected = dict(zip(map(_name_in_file, access.names), access.shapes, strict=True))
    differing = sorted(expected.keys() ^ tensors.keys())
    differing += [name for name in expected if _shape(tensors, name) != expected[name]]
    if differing:
        raise ValueError(
            f"the adapter in {directory} does not fit model.base: {len(differing)} tensors are on "
            f"one side alone or of another shape, such as {differing[0]}; it belongs to the base "
            f"{saved.get('base_model_name_or_path')!r} with target_modules "
            f"{saved.get('target_modules')}"
        )
    values = torch.cat([tensors[name].flatten().float() for name in expected])
    access.write(values.to(access.device))


def _name_in_file(name: str) -> str:
    """PEFT leaves out which of a model's adapters a tensor is of."""
    return name.replace(".default", "")


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
