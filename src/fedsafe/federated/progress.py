"""The progress of a federated run: a bar in a terminal, a line a round elsewhere."""

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from fedsafe.data.packing import TrainingBatch
from fedsafe.federated.server_listener import RoundListener, ServerVisitListener


class RoundProgressBar(TQDMProgressBar, RoundListener, ServerVisitListener):
    """One bar a round, `round 3/50 · client 2/5`, with the figures of the last round.

    Where the output is no terminal but a file or a pipe, a line at the end of each round instead.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        super().__init__(refresh_rate=1 if self._is_terminal else 0)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Say which round begins."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description_str(_round_of(trainer))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TrainingBatch, batch_idx: int
    ) -> None:
        """Say which visit begins."""
        key = batch.key
        if key.is_server_visit or key.is_idle:
            return
        if key.starts_visit or batch_idx == 0:
            num_visits = trainer.datamodule.schedule.clients_per_round  # type: ignore[attr-defined]
            self.train_progress_bar.set_description_str(
                f"round {key.round + 1}/{key.num_rounds} · client {key.visit + 1}/{num_visits}"
            )

    def on_clients_progress(self, trainer: Trainer, doing: str) -> None:
        """Say who is awaited."""
        self.train_progress_bar.set_description_str(f"{_round_of(trainer)} · {doing}")

    def on_server_progress(self, trainer: Trainer, doing: str) -> None:
        """Say what the server is doing."""
        if self._train_progress_bar is not None:  # pairs may be made before the first round
            self._train_progress_bar.set_description_str(f"{_round_of(trainer)} · server: {doing}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the figures of the round."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self._is_terminal and trainer.is_global_zero:
            metrics = self.get_metrics(trainer, pl_module)
            figures = [f"{name} {_short(value)}" for name, value in metrics.items()]
            sys.stdout.write(" · ".join([_round_of(trainer), *figures]) + "\n")
            sys.stdout.flush()

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Losses and safety figures; no version number."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


def _round_of(trainer: Trainer) -> str:
    return f"round {trainer.current_epoch + 1}/{trainer.max_epochs}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
