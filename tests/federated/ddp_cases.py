"""Small federations, run one after another under one strategy: in one process or on ranks.

    python -m torch.distributed.run --nproc_per_node=2 ddp_cases.py FOLDER BASE CONVERSATIONS

leaves `FOLDER/<case>/`: a run directory, and `adapter.pt`, the last global adapter.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from federations import Federation, build_federation
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy

from fedsafe.federated.checkpoint import RoundCheckpoint, last_checkpoint
from fedsafe.federated.client_drift import FedProx, Scaffold
from fedsafe.federated.server_optimizer import FedAdam

Settings = dict[str, dict[str, Any]]

CASES: dict[str, Callable[[], Settings]] = {
    "fedavg": lambda: {"rounds": {"clients_per_round": 3}, "trainer": {"max_epochs": 3}},
    "scaffold": lambda: {"rounds": {"client_drift": Scaffold(), "clients_per_round": 3}},
    "fedprox": lambda: {"rounds": {"client_drift": FedProx(mu=0.5)}},
    "fedadam": lambda: {"rounds": {"server_optimizer": FedAdam()}},
    "epochs": lambda: {"rounds": {"local_epochs": 2}},
    "accumulated": lambda: {"trainer": {"accumulate_grad_batches": 2}},
    "clipped": lambda: {"trainer": {"gradient_clip_val": 0.01}},
    "dropout": lambda: {"model": {"lora_dropout": 0.3}},
    "local": lambda: {"rounds": {"mode": "local"}, "data": {"validation_share": 0.3}},
    "central": lambda: {"rounds": {"mode": "central"}, "data": {"validation_share": 0.3}},
    "sgd": lambda: {"model": {"optimizer": "sgd", "learning_rate": 0.1}},
    "checkpointed": lambda: {"model": {"gradient_checkpointing": True}},
    "one_sample_steps": lambda: {"data": {"batch_size": 1}},
}
"""Settings by name; each call makes new objects, which remember nothing of another run."""

RESUMED = "resumed"
"""A run that is stopped inside a visit, and goes on in a new Trainer."""
STOP_AFTER = 4
"""Steps, of 12."""


def run_cases(
    folder: Path, *, base: Path, path: Path, strategy: Callable[[], Any] | None = None
) -> None:
    """Run every case."""
    for name, settings in CASES.items():
        finish(federation_of(folder / name, settings(), base, path, strategy).fit())
    start_and_stop(folder / RESUMED, base=base, path=path, strategy=strategy)
    resume(folder / RESUMED, base=base, path=path, strategy=strategy)


def federation_of(
    folder: Path,
    settings: Settings,
    base: Path,
    path: Path,
    strategy: Callable[[], Any] | None,
    **more: Any,
) -> Federation:
    """A federation under a strategy; None is one process."""
    # where a gradient is nearly zero, rounding decides the sign of AdamW's step: keep steps small
    model = {"learning_rate": 1e-3, **settings.get("model", {})}
    trainer = settings.get("trainer", {})
    if strategy is not None:
        trainer = {"strategy": strategy(), "devices": 2, **trainer}
    return build_federation(
        folder, base=base, path=path, **{**settings, "model": model, "trainer": trainer}, **more
    )


class SavesOnce(RoundCheckpoint):
    """Keeps the first checkpoint, inside a visit, as a run does that is killed after it."""

    has_saved = False

    def _save(self, trainer: Trainer) -> None:
        if not self.has_saved:  # not by the file, which rank 0 may have written already
            super()._save(trainer)
        self.has_saved = True


def start_and_stop(folder: Path, *, base: Path, path: Path, strategy: Any) -> None:
    """Leave a checkpoint that was written inside a visit, and nothing later."""
    settings = {"rounds": {"client_drift": Scaffold()}}
    save = SavesOnce(every_n_steps=STOP_AFTER)
    run = federation_of(folder, settings, base, path, strategy, callbacks=(save,)).fit()
    if run.trainer.is_global_zero:
        (folder / "rounds.jsonl").unlink()
    run.trainer.strategy.barrier()


def resume(folder: Path, *, base: Path, path: Path, strategy: Any) -> None:
    """Go on from that checkpoint."""
    settings = {"rounds": {"client_drift": Scaffold()}}
    run = federation_of(folder, settings, base, path, strategy)
    finish(run.fit(ckpt_path=last_checkpoint(folder)))


def finish(run: Federation) -> None:
    """Leave the adapter; every rank must have the same."""
    if run.trainer.is_global_zero:
        torch.save(run.adapter, run.folder / "adapter.pt")
    everyones = run.rounds._layout.world.gather(run.adapter)
    assert all(torch.equal(each, run.adapter) for each in everyones)


if __name__ == "__main__":
    run_cases(
        Path(sys.argv[1]), base=Path(sys.argv[2]), path=Path(sys.argv[3]), strategy=DDPStrategy
    )
