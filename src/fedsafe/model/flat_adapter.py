"""The adapter as one flat float32 vector, read from and written to the model's parameters.

Training, aggregation and checkpoints use the vector; PEFT's own format is for files (see
`model.adapter`). How the parameters are kept depends on the strategy: whole on each rank, or split
over ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerState = dict[str, Tensor]
"""An optimizer's memory of the adapter: a flat vector by the name of each moment, and `step`."""

STEP = "step"


class FlatAdapter(ABC):
    """The trainable LoRA tensors of one model, as views of a vector.

    All ranks that keep parts of the same tensors must call together, and must write the same.

    Args:
        named_parameters: ``(name, parameter)`` pairs; those that need no gradient are left out.

    Raises:
        ValueError: If no parameter is trainable.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
        if not trainable:
            raise ValueError("the model has no trainable parameter; add LoRA before training")
        self.names = [name for name, _ in trainable]
        self.parameters: list[Tensor] = [p for _, p in trainable]
        self.shapes = [self.whole_shape(p) for p in self.parameters]
        self._sizes = [shape.numel() for shape in self.shapes]
        self.num_params = sum(self._sizes)

    @staticmethod
    def whole_shape(parameter: Tensor) -> torch.Size:
        """Shape of a parameter that may be kept in parts."""
        return parameter.shape

    @property
    def device(self) -> torch.device:
        """Where vectors are."""
        return self.parameters[0].device

    def views(self, vector: Tensor) -> list[Tensor]:
        """The vector's slices in the parameters' shapes; they share its memory."""
        parts = vector.split(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def named_views(self, vector: Tensor) -> dict[str, Tensor]:
        """The vector's slices by the parameters' names."""
        return dict(zip(self.names, self.views(vector), strict=True))

    def empty(self) -> Tensor:
        """A vector to be filled, float32, shape ``(num_params,)``."""
        return torch.empty(self.num_params, dtype=torch.float32, device=self.device)

    @abstractmethod
    def read(self) -> Tensor:
        """A copy of the adapter, flat float32, shape ``(num_params,)``."""

    @abstractmethod
    def write(self, vector: Tensor) -> None:
        """Overwrite the model's adapter with `vector`, shape ``(num_params,)``."""

    @abstractmethod
    def read_gradient(self) -> Tensor:
        """A copy of the last backward pass's gradient, averaged over the ranks of a group.

        Returns:
            Flat float32, shape ``(num_params,)``.

        Raises:
            ValueError: If a parameter took no part in the loss.
        """

    @abstractmethod
    def write_gradient(self, vector: Tensor) -> None:
        """Overwrite the gradient that the optimizer is about to step along."""

    @abstractmethod
    def forget(self, optimizer: Optimizer) -> None:
        """Make the optimizer as new: no moments, no steps."""

    @abstractmethod
    def optimizer_state(self, optimizer: Optimizer) -> OptimizerState:
        """A copy of what the optimizer remembers; empty for a new one."""

    @abstractmethod
    def load_optimizer_state(self, optimizer: Optimizer, state: OptimizerState) -> None:
        """Make the optimizer remember what `optimizer_state` returned, on whatever strategy."""


class WholeAdapter(FlatAdapter):
    """An adapter that each rank holds whole: on one device, under DDP, with clients in parallel."""

    @torch.no_grad()
    def read(self) -> Tensor:
        """See `FlatAdapter`."""
        vector = self.empty()
        torch._foreach_copy_(self.views(vector), self.parameters)
        return vector

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """See `FlatAdapter`."""
        torch._foreach_copy_(self.parameters, self.views(vector))

    def gradients(self) -> list[Tensor]:
        """The gradients of the last backward pass, one a parameter.

        Raises:
            ValueError: If a parameter took no part in the loss.
        """
        return present_gradients(self)

    @torch.no_grad()
    def read_gradient(self) -> Tensor:
        """See `FlatAdapter`."""
        vector = self.empty()
        torch._foreach_copy_(self.views(vector), self.gradients())
        return vector

    @torch.no_grad()
    def write_gradient(self, vector: Tensor) -> None:
        """See `FlatAdapter`."""
        torch._foreach_copy_(self.gradients(), self.views(vector))

    def forget(self, optimizer: Optimizer) -> None:
        """See `FlatAdapter`."""
        optimizer.state.clear()

    def optimizer_state(self, optimizer: Optimizer) -> OptimizerState:
        """See `FlatAdapter`."""
        return gathered_state([optimizer.state.get(p, {}) for p in self.parameters], self._flat)

    def load_optimizer_state(self, optimizer: Optimizer, state: OptimizerState) -> None:
        """See `FlatAdapter`."""
        optimizer.state.clear()
        moments = {name: self.views(vector) for name, vector in state.items() if name != STEP}
        for place, parameter in enumerate(self.parameters if state else []):
            optimizer.state[parameter] = {
                STEP: state[STEP].clone(),
                **{name: views[place].to(parameter, copy=True) for name, views in moments.items()},
            }

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        vector = self.empty()
        torch._foreach_copy_(self.views(vector), list(parts))
        return vector


def present_gradients(adapter: FlatAdapter) -> list[Tensor]:
    """The parameters' gradients as they are kept.

    Raises:
        ValueError: If a parameter has none.
    """
    pairs = zip(adapter.names, adapter.parameters, strict=True)
    missing = [name for name, parameter in pairs if parameter.grad is None]
    if missing:
        raise ValueError(
            f"{len(missing)} adapter tensors got no gradient, the first is {missing[0]}; "
            "leave its module out of target_modules"
        )
    return [p.grad for p in adapter.parameters if p.grad is not None]


def gathered_state(states: Sequence[dict[str, Any]], flat: Any) -> OptimizerState:
    """An optimizer's memory of all parameters, moment by moment.

    Args:
        states: What the optimizer remembers of each parameter, in order; empty for a new one.
        flat: Makes one vector of a moment's tensors.
    """
    if not any(states):
        return {}
    moments = [name for name in states[0] if name != STEP]
    step = torch.as_tensor(states[0].get(STEP, 0.0), dtype=torch.float32).cpu().clone()
    return {STEP: step, **{name: flat([state[name] for state in states]) for name in moments}}
