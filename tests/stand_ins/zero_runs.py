"""Small federations under ZeRO: cases of `tests/federated/ddp_cases.py`, and some more.

    python -m torch.distributed.run --nproc_per_node=2 zero_runs.py FOLDER BASE CONVERSATIONS

leaves `FOLDER/<way>/<case>/`; the ways are ddp, zero1, zero2 and zero3.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cpu_zero import CPUZeroStrategy
from deepspeed import DeepSpeedEngine
from federations import Federation
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from fedsafe.data.augmentation import CaiAugmentation
from fedsafe.federated.checkpoint import RoundCheckpoint, last_checkpoint
from fedsafe.federated.client_drift import FedProx, Scaffold
from fedsafe.federated.constitutional_training import ConstitutionalTraining
from fedsafe.model.adapter import save_adapter
from fedsafe.model.generation import generate_answers
from fedsafe.model.module import LoraLM
from fedsafe.types import Turn

sys.path.append(str(Path(__file__).parents[1] / "federated"))
from ddp_cases import (  # found once its folder is known
    RESUMED,
    federation_of,
    finish,
    resume,
    start_and_stop,
)

Strategy = Callable[[], Any]
Settings = dict[str, Any]

WAYS: dict[str, Strategy] = {
    "ddp": DDPStrategy,
    **{f"zero{stage}": partial(CPUZeroStrategy, stage=stage) for stage in (1, 2, 3)},
}
OFFLOADED: dict[str, Strategy] = {
    "zero1": partial(CPUZeroStrategy, stage=1, offload="optimizer"),
    "zero2": partial(CPUZeroStrategy, stage=2, offload="optimizer"),
    "zero3": partial(CPUZeroStrategy, stage=3, offload="parameters"),
}
THREE_BY_THREE: Settings = {"clients_per_round": 3}

CASES: dict[str, Callable[[], Settings]] = {
    "fedavg": lambda: {"rounds": {**THREE_BY_THREE}},
    "scaffold": lambda: {"rounds": {**THREE_BY_THREE, "client_drift": Scaffold()}},
    "fedprox": lambda: {"rounds": {**THREE_BY_THREE, "client_drift": FedProx(mu=0.5)}},
    "mixed": lambda: {"trainer": {"precision": "bf16-mixed"}},
    "checkpointed": lambda: {"model": {"gradient_checkpointing": True}},
    "accumulated": lambda: {"trainer": {"accumulate_grad_batches": 2}},
    "clipped": lambda: {
        "rounds": {"client_drift": Scaffold()},
        "trainer": {"gradient_clip_val": 0.01},
    },
}
"""Settings by name; each call makes new objects."""
MEASURED = ("fedavg", "mixed")
SERVED = "served"
"""A server visit, whose steps have two parts a rank."""
PAIRS = "pairs.jsonl"


def served(folder: Path) -> Settings:
    cai = CaiAugmentation(pairs=str(folder / PAIRS), batch_size=4)
    rules = ConstitutionalTraining(iterations=3, sft_learning_rate=1e-3, dpo_learning_rate=1e-3)
    return {
        "data": {"cai": cai},
        "rounds": {"cai": rules},
        "trainer": {"accumulate_grad_batches": 2},
    }


def run_all(folder: Path, base: Path, path: Path) -> None:
    for way, strategy in WAYS.items():
        for case, settings in CASES.items():
            done = run(folder / way / case, settings(), base, path, strategy)
            if case in MEASURED:
                measure(done, settings(), base, path, strategy)
            if case == "fedavg":
                note_refusal(done)
                train_again(done, base, path, strategy)
        run(folder / way / SERVED, served(folder), base, path, strategy)
        resumed = folder / way / RESUMED
        start_and_stop(resumed, base=base, path=path, strategy=strategy)
        resume(resumed, base=base, path=path, strategy=strategy)
    for way, strategy in OFFLOADED.items():
        for case in ("fedavg", "clipped"):
            run(folder / f"{way}-offload" / case, CASES[case](), base, path, strategy)


def run(
    folder: Path, settings: Settings, base: Path, path: Path, strategy: Strategy | None
) -> Federation:
    save = RoundCheckpoint()
    done = federation_of(folder, settings, base, path, strategy, callbacks=(save,)).fit()
    finish(done)
    return done


def measure(
    done: Federation, settings: Settings, base: Path, path: Path, strategy: Strategy
) -> None:
    """Validate the checkpoint of a run, and test its adapter's files, with models of their own."""
    settings = {**settings, "data": {"validation_share": 0.3}}
    make = partial(federation_of, settings=settings, base=base, path=path, strategy=strategy)
    speak = Speak()
    fresh = make(done.folder / "validated", callbacks=(speak,))
    found: dict[str, Any] = {"said": speak.said}
    found["validated"] = fresh.trainer.validate(
        fresh.module, datamodule=fresh.data, ckpt_path=last_checkpoint(done.folder), verbose=False
    )
    engine = fresh.trainer.strategy.model
    own = isinstance(engine, DeepSpeedEngine)  # DeepSpeed's overrules the autocast around it
    mixed = fresh.trainer.precision == "bf16-mixed"
    found["autocast"] = engine.torch_autocast_enabled() if own else mixed
    settings["data"] = {"test_path": str(path)}
    fresh = make(done.folder / "tested")
    fresh.module.adapter_folder = done.folder / "adapter"
    found["tested"] = fresh.trainer.test(fresh.module, datamodule=fresh.data, verbose=False)
    if done.trainer.is_global_zero:
        (done.folder / "measured.json").write_text(json.dumps(found))


class Speak(Callback):
    """Lets the model answer when it is not trained."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LoraLM)
        asked = [[Turn(role="user", content=text)] for text in ("hi", "sun and moon")]
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        self.said += generate_answers(pl_module.peft_model, tokenizer, asked, max_new_tokens=5)


def train_again(done: Federation, base: Path, path: Path, strategy: Strategy) -> None:
    """Train the model of a run that is over once more, in a new Trainer."""
    more = federation_of(done.folder / "more", {}, base, path, strategy)
    finish(replace(more, module=done.module).fit())


def note_refusal(done: Federation) -> None:
    """What is said when an adapter is saved without gathering it."""
    if done.trainer.is_global_zero:
        try:
            save_adapter(done.module.peft_model, done.folder / "by-hand")
        except ValueError as error:
            (done.folder / "refusal.txt").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(*map(Path, sys.argv[1:4]))
    dist.barrier()
    dist.destroy_process_group()
