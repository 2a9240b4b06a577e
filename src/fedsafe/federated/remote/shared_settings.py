"""The settings that the server and every node must share, by the names that a user types.

Where the data are, how they are filtered, the hardware and how its memory is spared are a node's
own business. A base may lie anywhere, if its weights are the same.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from fedsafe import __version__
from fedsafe.data.tokens import tokenizer_key
from fedsafe.model.identity import numbers_of
from fedsafe.safety.guard_format import load_format
from fedsafe.safety.verdict_targets import VerdictTargets

_MODEL = (
    "rank",
    "alpha",
    "lora_dropout",
    "target_modules",
    "dtype",
    "quantize_4bit",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "lr_schedule",
    "lr_floor",
    "warmup_rounds",
    "warmup_steps",
)
_DATA = ("batch_size", "max_length")
_FEDERATED = ("mode", "local_steps", "local_epochs")
_LIBRARIES = ("torch", "transformers", "peft")
_ADAPTER = "lora_"
_WRAPPED = ".base_layer."
_SAMPLED = 64
"""Values of each tensor that a base is told by."""


def shared_settings(
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    federated: Mapping[str, Any],
    trainer: Trainer,
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """What must be the same at both ends; JSON values.

    Args:
        model: Settings of `LoraLM` by name (its `hparams`).
        data: Settings of `FederatedDataModule` by name.
        federated: Settings of `FederatedRounds` by name.
        trainer: A Trainer with the settings that visits run under.
        base: The model, with or without its adapter.
        tokenizer: With its chat template.
    """
    drift = federated["client_drift"]
    clips = trainer.gradient_clip_val or None
    algorithm = getattr(trainer.gradient_clip_algorithm, "value", "norm")
    return {
        **{f"model.{name}": _plain(model[name]) for name in _MODEL},
        "model.base": base_digest(base),
        "data.tokenizer": tokenizer_digest(tokenizer),
        **{f"data.{name}": data[name] for name in _DATA},
        "data.verdict_targets": _told_targets(data["verdict_targets"]),
        **{f"federated.{name}": federated[name] for name in _FEDERATED},
        "federated.client_drift": None if drift is None else type(drift).__name__,
        **numbers_of("federated.client_drift", drift),
        "trainer.precision": trainer.precision,
        "trainer.gradient_clip_val": clips,
        "trainer.gradient_clip_algorithm": algorithm if clips else None,
        "seed_everything": federated["seed"],
    }


def library_versions() -> dict[str, str]:
    """Versions of what training depends on, without the device that they were built for."""
    others = {name: version(name).partition("+")[0] for name in _LIBRARIES}
    return {"fedsafe": __version__, **others}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What differs between two ends, a line each: ``model.rank is 8 there and 16 here``.

    A base whose weights one end cannot tell by a digest (in 4 bits, or split over ranks) counts as
    the same.

    Args:
        theirs: Settings, or versions, of the other end.
        ours: Those of this end.
    """
    return [
        f"{name} is {_shown(theirs, name)} there and {_shown(ours, name)} here"
        for name in sorted(theirs.keys() | ours.keys())
        if _shown(theirs, name) != _shown(ours, name) and not _is_untold(name, theirs, ours)
    ]


def base_digest(base: nn.Module) -> str | None:
    """Short digest of a base's weights, by some values of each tensor; the adapter is left out.

    The same for every type of float that the weights are kept in, up to bfloat16's rounding.

    Returns:
        None for weights in 4 bits, or of which this process holds parts alone.
    """
    digest = hashlib.blake2b(digest_size=6)
    named = ((name.replace(_WRAPPED, "."), p) for name, p in base.named_parameters())
    for name, parameter in sorted(named, key=lambda each: each[0]):
        if _ADAPTER in name:
            continue
        if not parameter.is_floating_point() or _is_in_parts(parameter):
            return None
        values = parameter.detach().reshape(-1)
        sampled = values[:: max(1, len(values) // _SAMPLED)].to("cpu", torch.bfloat16)
        digest.update(f"{_name_in_base(name)} {list(parameter.shape)}".encode())
        digest.update(sampled.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short digest of all that decides how a conversation becomes tokens."""
    return _digest(tokenizer_key(tokenizer))


def _told_targets(targets: VerdictTargets | None) -> dict[str, Any] | None:
    """What a guard is trained on; its format by a digest, for it may be a file of the node."""
    if targets is None:
        return None
    format_ = asdict(load_format(targets.format))
    del format_["name"]  # that of the file
    return {**asdict(targets), "format": _digest(format_)}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _name_in_base(name: str) -> str:
    """Without what PEFT puts in front."""
    return name.removeprefix("base_model.model.")


def _is_in_parts(parameter: Tensor) -> bool:
    """Whether ranks hold parts: FSDP2's, or ZeRO-3's, which are known by an attribute."""
    return isinstance(parameter, DTensor) or "ds_id" in vars(parameter)


def _is_untold(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return name == "model.base" and None in (theirs.get(name, ""), ours.get(name, ""))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], sort_keys=True) if name in settings else "missing"
