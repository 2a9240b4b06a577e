"""Checkpoints that a kill or a full disk cannot spoil: written beside, then renamed."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fedsafe.data.packing import TrainingBatch
from fedsafe.federated.server_listener import ServerVisitListener


def last_checkpoint(run_dir: Path) -> Path:
    """Where a run keeps its newest checkpoint, whether there is one or not."""
    return run_dir / "checkpoints" / "last.ckpt"


class RoundCheckpoint(Checkpoint, ServerVisitListener):
    """Saves the run to `checkpoints/last.ckpt` of the run directory at the end of each round.

    Args:
        every_n_steps: Save inside a round too, after every so many optimizer steps: for rounds that
            take hours. None saves at the ends of rounds only.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; give 1 or more, or leave it out")
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: TrainingBatch,
        batch_idx: int,
    ) -> None:
        """Save inside a round; its last step is left to the end of the round, after validation."""
        if self.every_n_steps is None or batch_idx + 1 == trainer.num_training_batches:
            return
        steps, parts = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if parts == 0 and steps % self.every_n_steps == 0:
            self._save(trainer)

    def on_server_step(self, trainer: Trainer, num_done: int) -> None:
        """Save inside a server visit."""
        if self.every_n_steps is not None and num_done % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished round; one that was stopped halfway would be taken for finished."""
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if done >= trainer.num_training_batches:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(last_checkpoint(Path(trainer.default_root_dir)))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint file, written beside the old one and renamed when it is whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`; on failure the file that was there stays.

        Raises:
            OSError: If the disk is full or not writable; names the file that is still good.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(target.name + ".tmp")
        try:
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            scratch.unlink(missing_ok=True)
            kept = f"{target} still holds the last good one" if target.exists() else "none was kept"
            raise OSError(
                f"the checkpoint could not be written to {target.parent} ({error}); {kept}. Free "
                "some space and resume with --ckpt_path last"
            ) from error
