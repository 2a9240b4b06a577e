"""One client's visit: the global adapter in, its update out.

Nothing here knows who calls: `FederatedRounds` simulates many clients in one process with
`LocalTraining`, and one client of a real federation trains with `train_client`, which runs the same
steps.
"""

from collections.abc import Iterable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from fedsafe.data.packing import TrainingBatch
from fedsafe.federated.client_drift import ClientDrift, Correction
from fedsafe.federated.server import Update
from fedsafe.federated.trainer_settings import check_precision_for_drift
from fedsafe.model.flat_adapter import FlatAdapter
from fedsafe.model.module import LoraLM
from fedsafe.peers import ALONE, Peers
from fedsafe.strategies.layout import layout_of


class LocalTraining:
    """The local training of one visit, driven batch by batch.

    Args:
        adapter: The model's trainable parameters.
        optimizer: Their optimizer; its state is cleared by `begin`.
        correction: Change of the gradients against client drift, or None.
        peers: The ranks that train on other parts of the same steps.
    """

    def __init__(
        self,
        adapter: FlatAdapter,
        optimizer: Optimizer,
        correction: Correction | None,
        *,
        peers: Peers = ALONE,
    ) -> None:
        self.correction = correction
        self._peers = peers
        self._adapter = adapter
        self._optimizer = optimizer
        self._nll = torch.zeros((), device=adapter.device)
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=adapter.device)
        self._num_steps = 0

    def begin(self, start: Tensor, *, fresh_optimizer: bool = True) -> None:
        """Load the adapter to start from; the optimizer forgets the client before."""
        self._adapter.write(start)
        if fresh_optimizer:
            self._adapter.forget(self._optimizer)

    def correct_gradients(self) -> None:
        """Call after the backward pass, before the optimizer steps."""
        self._num_steps += 1
        if self.correction is not None:
            self.correction.apply(self._adapter)

    def record(self, nll_sum: Tensor, *, num_tokens: int) -> None:
        """Note the loss of one batch, or part: the sum over its answer tokens, and their number."""
        self._nll += nll_sum
        self._num_tokens += num_tokens

    def finish(self) -> Update:
        """The update, once the last step was taken."""
        nll, num_tokens = (total.item() for total in self._totals())
        loss = nll / max(1, num_tokens)
        return Update(self._adapter.read(), loss, self._num_steps, int(num_tokens))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint inside the visit must hold beside the adapter and the optimizer."""
        nll, num_tokens = self._totals()
        return {
            "nll": nll,
            "num_tokens": num_tokens,
            "num_steps": self._num_steps,
            "correction": self.correction.state_dict() if self.correction is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self._peers.index == 0:  # the sum over all; what the others add is new
            self._nll.copy_(state["nll"])
            self._num_tokens.copy_(state["num_tokens"])
        self._num_steps = state["num_steps"]
        if self.correction is not None:
            self.correction.load_state_dict(state["correction"])

    def _totals(self) -> tuple[Tensor, Tensor]:
        """Loss and number of tokens over all ranks."""
        return self._peers.sum_(self._nll.clone()), self._peers.sum_(self._num_tokens.clone())


def train_client(
    module: LoraLM,
    batches: Iterable[TrainingBatch],
    *,
    start: Tensor,
    client: int = 0,
    drift: ClientDrift | None = None,
    trainer_settings: dict[str, Any] | None = None,
) -> Update:
    """Train `start` on one client's batches; the same steps as a visit of `FederatedRounds`.

    Args:
        module: The model; its base stays loaded from call to call, its adapter is overwritten.
        batches: The visit's batches, as `FederatedDataModule.client_dataloader` gives them.
        start: Adapter to start from, flat float32, shape ``(num_params,)``.
        client: Number of the client, for `drift`.
        drift: Correction against client drift, with this client's memory; None is plain FedAvg.
        trainer_settings: Settings of the Lightning Trainer: devices, strategy, precision, clipping,
            further callbacks.

    Returns:
        The update, on the device that it was trained on.

    Raises:
        RefusedUpdateError: If what `drift` would remember of the visit is not finite.
        ValueError: If the Trainer accumulates other parts of a step than the batches are, or scales
            gradients that `drift` corrects.
    """
    visit = _OneVisit(start, client=client, drift=drift)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings = {**quiet, **(trainer_settings or {})}
    given = settings.pop("callbacks", None) or []
    callbacks = [visit, *(given if isinstance(given, list) else [given])]
    trainer = Trainer(max_epochs=1, callbacks=callbacks, use_distributed_sampler=False, **settings)
    trainer.fit(module, train_dataloaders=batches)
    assert visit.update is not None, "the trainer was told to stop before the visit's last batch"
    return visit.update


class _OneVisit(Callback):
    """Drives one `LocalTraining` through a fit of one epoch."""

    def __init__(self, start: Tensor, *, client: int, drift: ClientDrift | None) -> None:
        self.update: Update | None = None
        self._start = start
        self._client = client
        self._drift = drift

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LoraLM)
        if self._drift:
            check_precision_for_drift(trainer)
        self._start = self._start.to(pl_module.device)
        correction = self._drift.correction(self._client, self._start) if self._drift else None
        self._local = LocalTraining(
            pl_module.flat_adapter(),
            trainer.optimizers[0],
            correction,
            peers=layout_of(trainer.strategy).data,
        )
        self._local.begin(self._start)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TrainingBatch, batch_idx: int
    ) -> None:
        if batch.key.num_micro != trainer.accumulate_grad_batches:
            raise ValueError(
                f"the batches are parts of steps of {batch.key.num_micro}, but "
                f"accumulate_grad_batches is {trainer.accumulate_grad_batches}; give the trainer "
                f"accumulate_grad_batches={batch.key.num_micro}"
            )

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._local.correct_gradients()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: TrainingBatch,
        batch_idx: int,
    ) -> None:
        self._local.record(outputs["nll_sum"], num_tokens=len(batch.targets))
        if not batch.key.ends_visit:
            return
        self.update = self._local.finish()
        if self._drift and self._local.correction is not None:
            self._local.correction.check()
            self._drift.collect(self._client, self._local.correction)
