"""Optimizer steps outside of Lightning's loop, on one rank or on all together."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from fedsafe.data.packing import PreferenceBatch, SupervisedBatch
from fedsafe.model.module import LoraLM
from fedsafe.strategies.layout import layout_of


class NonFiniteLossError(ValueError):
    """A step of the server visit whose loss is not a number; the adapter was not changed by it."""


class Step(NamedTuple):
    """What a step was like, over all ranks."""

    loss: float
    num_preferred: int
    """Pairs of which the better answer became likelier than under the reference."""


class ServerSteps:
    """Takes the steps of the server visit with the clients' optimizer.

    Args:
        trainer: Its strategy and first optimizer take the steps.
        module: The model; its adapter is trained from where it is.
    """

    def __init__(self, trainer: Trainer, module: LoraLM) -> None:
        self._trainer = trainer
        self._module = module
        self._adapter = module.flat_adapter()
        self._layout = layout_of(trainer.strategy)

    def begin(self) -> None:
        """Make the optimizer as new."""
        self._adapter.forget(self._trainer.optimizers[0])

    def take(
        self,
        batches: Sequence[SupervisedBatch | PreferenceBatch],
        *,
        rate: float,
        name: str,
        samples: str,
    ) -> Step:
        """One optimizer step.

        Args:
            batches: This rank's part of it; all ranks' together are the step.
            rate: Learning rate.
            name: What the step is called in an error.
            samples: What its samples are called.

        Raises:
            NonFiniteLossError: If the loss, or the adapter after the step, is not finite; on all
                ranks.
        """
        optimizer = self._trainer.optimizers[0]
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = Step(0.0, 0)

        def closure() -> Tensor:
            nonlocal total
            optimizer.zero_grad()
            loss = torch.zeros(())
            for number, batch in enumerate(batches, start=1):
                with self._passes(are_last=number == len(batches)):
                    loss, found = self._forward(batch)
                    if not math.isfinite(found.loss):
                        text = f"{name} has the loss {found.loss} (its samples: {samples})"
                        raise NonFiniteLossError(text)
                    self._trainer.strategy.backward(loss, optimizer)
                total = Step(total.loss + found.loss, total.num_preferred + found.num_preferred)
            self._add_up_over_groups()
            return loss

        self._module.optimizers().step(closure)  # type: ignore[union-attr]
        if not self._adapter.read().isfinite().all():
            raise NonFiniteLossError(
                f"{name} leaves an adapter that is not finite (its samples: {samples})"
            )
        return total

    def _passes(self, *, are_last: bool) -> AbstractContextManager[Any]:
        """Around a forward and a backward pass: gradients are averaged in a step's last ones."""
        strategy = self._trainer.strategy
        if are_last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        return strategy.block_backward_sync()

    def _forward(self, batch: SupervisedBatch | PreferenceBatch) -> tuple[Tensor, Step]:
        """What to go backward from, and what all ranks found in the batches they are at."""
        strategy, world = self._trainer.strategy, self._layout.world
        output: Any = strategy.training_step(strategy.batch_to_device(batch), 0)
        loss, num_preferred = output["loss"].item(), float(output.get("num_preferred", 0))
        if world.size > 1:
            both = torch.tensor([loss, num_preferred], dtype=torch.float64)
            loss, num_preferred = world.sum_(both.to(self._module.device)).tolist()
        # the strategy takes the mean over the ranks of a group, and the step is their sum
        return output["loss"] * self._layout.data.size, Step(loss, int(num_preferred))

    def _add_up_over_groups(self) -> None:
        """Make the gradient that of the whole step where groups of ranks train apart."""
        groups = self._layout.clients
        if groups.size > 1:
            self._adapter.write_gradient(groups.sum_(self._adapter.read_gradient()))
