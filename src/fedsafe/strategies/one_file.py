"""`OneFileCheckpoints`: a checkpoint is one file without the model, that one rank writes."""

from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer


class OneFileCheckpoints(Strategy):
    """For strategies that split a model or its optimizer; put it before Lightning's own.

    The base is frozen, and `FederatedRounds` keeps the adapter and what the optimizer remembers.
    """

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """No part of a checkpoint waits for the model; callbacks read it before `on_fit_start`."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """There is none."""

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write the file on rank 0."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file on every rank."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
