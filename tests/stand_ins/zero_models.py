"""Models that ZeRO-3 splits over two ranks, each beside the same model whole on every rank.

    python -m torch.distributed.run --nproc_per_node=2 zero_models.py FOLDER TINY_GPT2 TINY_LLAMA

leaves `FOLDER/rank<n>.pt`: by case, what was seen of the whole model and of the split one.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from cpu_zero import CPUZeroStrategy
from deepspeed import zero
from lightning import Callback, LightningModule, Trainer
from sharded_models import _LLAMA, CASES, Seen, module_of, samples, spoken
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedsafe.data.chat import ensure_chat_template
from fedsafe.data.packing import TrainingBatch
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.federated.client_drift import Scaffold
from fedsafe.federated.local_training import train_client
from fedsafe.federated.schedule import BatchKey
from fedsafe.model import module as model_module
from fedsafe.model.adapter import adapter_scale
from fedsafe.model.compilation import compile_layers
from fedsafe.model.module import LoraLM
from fedsafe.model.sharded_load import decoder_layers

NUM_STEPS = 3
PADDED = {"base": "llama", "from_config": _LLAMA | {"intermediate_size": 47}, "rank": 1}
"""Tensors with odd numbers of values, which two ranks cannot halve."""


def batches() -> list[TrainingBatch]:
    """Steps of one visit; both ranks train on the whole of each, so that the mean is no sum."""
    packed, none = samples(), np.zeros(0, dtype=np.int64)
    keys = [BatchKey(0, 1, 0, 0, step, NUM_STEPS, 0, 1, none, none) for step in range(NUM_STEPS)]
    return [
        TrainingBatch(**vars(packed), normalizer=sum(packed.target_counts), key=key) for key in keys
    ]


def start_of(module: LoraLM) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    adapter = module.flat_adapter()
    return 0.2 * torch.randn(adapter.num_params, generator=generator)


def see(module: LoraLM, tokenizer: Any) -> Seen:
    """What a model is and does, without training."""
    model, packed, adapter = module.peft_model, samples(), module.flat_adapter()
    adapter.write(start_of(module))
    seen: Seen = {"adapter": adapter.read(), "buffers": dict(module.named_buffers())}
    seen["logprobs"] = module.answer_logprobs(packed)
    if module.hparams["compile"]:  # every other kind of call takes seconds to trace
        return seen
    with adapter_scale(model, 0):
        seen["logprobs_of_the_base"] = module.answer_logprobs(packed)
    with adapter_scale(model, 0.5):
        seen["logprobs_at_half"] = module.answer_logprobs(packed)
    return seen | spoken(module, tokenizer)


def whole(module: LoraLM) -> dict[str, Tensor]:
    """Copies of a model's parameters, gathered if need be."""
    found = {}
    for name, parameter in module.named_parameters():
        with zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


class Look(Callback):
    """Looks at the split model before it is trained, and counts what is on this rank meanwhile."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.seen: Seen = {}
        self.most = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the adapter is overwritten."""
        assert isinstance(pl_module, LoraLM)
        self.seen["parameters"] = whole(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LoraLM)
        self.seen |= see(pl_module, self.tokenizer)
        base: Any = pl_module.peft_model.get_base_model()
        for layer in decoder_layers(base):
            for part in layer.children():
                part.register_forward_hook(lambda *_: self.count(base))

    def count(self, base: nn.Module) -> None:
        self.most = max(self.most, sum(p.numel() for p in base.parameters()))

    def held(self, module: LoraLM) -> dict[str, int]:
        parameters: list[Any] = list(module.parameters())
        return {
            "most": self.most,
            "parts": sum(p.ds_tensor.numel() for p in parameters),
            "at_rest": sum(p.numel() for p in parameters),
            "all": sum(p.ds_numel for p in parameters),
        }


def train_split(module: LoraLM, *callbacks: Callback, stage: Any = 3, **given: Any) -> Tensor:
    settings = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": CPUZeroStrategy(stage=stage, prefetch_elements=0),
        "callbacks": [*callbacks],
    }
    built = LoraLM(**module.hparams)
    built.configure_model()
    loader: Any = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    start = start_of(built)
    update = train_client(module, loader, start=start, trainer_settings=settings, **given)
    return update.adapter


def train_whole(module: LoraLM) -> Tensor:
    """The same steps in a plain loop."""
    adapter, optimizer = module.flat_adapter(), module.configure_optimizers()
    adapter.write(start_of(module))
    module._trainer = SimpleNamespace(optimizers=[optimizer], strategy=None)  # type: ignore[assignment]
    for batch in batches():
        module.on_train_batch_start(batch, 0)
        optimizer.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    return adapter.read()


def main(folder: Path, tiny_gpt2: str, tiny_llama: str) -> None:
    folders = {"TINY_GPT2": tiny_gpt2, "TINY_LLAMA": tiny_llama}
    tokenizer = load_tokenizer(tiny_gpt2)
    ensure_chat_template(tokenizer)
    model_file: Any = model_module
    model_file.compile_layers = partial(compile_layers, backend="eager")  # without a compiler
    found: dict[str, Any] = {}
    for case in CASES:
        look, parted, alone = Look(tokenizer), module_of(case, folders), module_of(case, folders)
        trained = train_split(parted, look)
        alone.configure_model()
        fresh = {"parameters": whole(alone)}
        found[case] = {
            "held": look.held(parted),
            "whole": {**fresh, **see(alone, tokenizer), "trained": train_whole(alone)},
            "split": {**look.seen, "trained": trained},
        }
    found["padded"] = train_padded()
    found["loads"] = count_loads(module_of("llama_folder", folders))
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train_padded() -> dict[str, Tensor]:
    """By stage and without, an adapter after steps whose gradients a correction has read."""
    alone = LoraLM(**PADDED)
    alone.configure_model()
    found = {"whole": train_whole(alone)}
    for stage in (1, 2, 3):
        found[f"zero{stage}"] = train_split(LoraLM(**PADDED), stage=stage, drift=Scaffold())
    return found


def count_loads(module: LoraLM) -> int:
    """How often this rank reads the base's files while the model is built."""
    strategy = CPUZeroStrategy(stage=3)
    quiet = {"logger": False, "enable_checkpointing": False}
    module._trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, **quiet)
    strategy.connect(module)
    with patch.object(model_module, "load_base", wraps=model_module.load_base) as load:
        module.configure_model()
    return load.call_count


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4])
