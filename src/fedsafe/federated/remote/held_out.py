"""The loss of the adapter that a client was sent, on samples that it holds out."""

from collections.abc import Iterable

import torch
from lightning import Callback, LightningModule, Trainer

from fedsafe.data.loaders import EvaluationBatch
from fedsafe.strategies.layout import layout_of


class HeldOutLoss(Callback):
    """Measures the adapter once, before the first step; changes nothing that training sees.

    Comes after what loads the adapter among the Trainer's callbacks.

    Args:
        packs: The samples held out.
    """

    def __init__(self, packs: Iterable[EvaluationBatch]) -> None:
        self._packs = packs
        self.nll = 0.0
        """Sum over the answer tokens, nats."""
        self.num_tokens = 0

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go through all packs."""
        pl_module.eval()  # no dropout
        totals = torch.zeros(2, dtype=torch.float64)
        with trainer.precision_plugin.val_step_context():
            for batch in self._packs:
                nll = pl_module(trainer.strategy.batch_to_device(batch))
                totals += torch.tensor([nll.double().sum().item(), len(nll)], dtype=torch.float64)
        pl_module.train()
        totals = layout_of(trainer.strategy).data.sum_(totals.to(pl_module.device))
        self.nll, self.num_tokens = totals[0].item(), int(totals[1])
