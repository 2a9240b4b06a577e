"""The progress bar of a federated run: `round 3/50 · client 2/5`."""


from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from fedsafe.data.packing import TrainingBatch


class RoundProgressBar(TQDMProgressBar):
    """One bar a round, with the visit it is at and the figures of the last round."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TrainingBatch, batch_idx: int
    ) -> None:
        """Say which visit begins."""
        key = batch.key
        if key.starts_visit or batch_idx == 0:
            num_visits = trainer.datamodule.schedule.clients_per_round  # type: ignore[attr-defined]
            self.train_progress_bar.set_description_str(
                f"round {key.round + 1}/{key.num_rounds} · client {key.visit + 1}/{num_visits}"
            )

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Losses and safety figures; no version number."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
