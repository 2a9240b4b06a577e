"""Which adapter is validated and tested, and where the measures of a round go."""

from abc import ABC
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from fedsafe.data.datamodule import GLOBAL_ADAPTER
from fedsafe.data.loaders import EvaluationBatch
from fedsafe.federated.server import Server
from fedsafe.model.flat_adapter import FlatAdapter
from fedsafe.model.module import LoraLM


class RoundEvaluation(Callback, ABC):
    """The half of `FederatedRounds` that is about evaluation."""

    server: Server
    _adapter: FlatAdapter
    _row: dict[str, Any] | None
    """Record of the round that has ended and is not written down yet."""
    _to_evaluate: Tensor | None
    """The global adapter of a checkpoint, where no fit is under way."""
    _resumed: dict[str, Any] | None
    """State of a checkpoint that no batch has gone on from yet."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the global adapter where a run that had ended was resumed: nothing was trained."""
        if self._resumed is not None:
            self._to_evaluate = self._resumed["server"]["adapter"]
            self._load_global(pl_module)
            self._to_evaluate = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the global adapter where no fit is under way."""
        self._load_global(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the global adapter: a checkpoint inside a round holds a client's beside it."""
        self._load_global(pl_module)

    def _load_global(self, pl_module: LightningModule) -> None:
        if self._to_evaluate is not None:
            assert isinstance(pl_module, LoraLM)
            adapter = pl_module.flat_adapter()
            adapter.write(self._to_evaluate.to(adapter.device))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: EvaluationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Load the adapter that the batch is for; without averaging each client has its own."""
        if batch.client != GLOBAL_ADAPTER:
            self._adapter.write(self.server.start_of(batch.client))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what validation measured to the round's record; checkpoints from now on hold it."""
        if self._row is not None:
            measured = trainer.callback_metrics.items()
            self._row |= {name: x.item() for name, x in measured if name.startswith("val/")}
