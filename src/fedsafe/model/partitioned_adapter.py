"""The adapter as a flat vector where DeepSpeed's ZeRO keeps it in parts.

Three copies of each value must agree: the parameter that the forward pass reads, the optimizer's
own copy of it, and the optimizer's memory. ZeRO-1 and ZeRO-2 split the last two over the ranks,
ZeRO-3 all three. DeepSpeed writes the first from the second after every step, so that a value
written to the parameter alone is lost at the next step without a sign of it.

References:
    Rajbhandari et al. (2020), ZeRO: Memory Optimizations Toward Training Trillion Parameter Models,
    section 5. https://arxiv.org/abs/1910.02054
"""

from abc import abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsafe.model.flat_adapter import STEP, FlatAdapter, OptimizerState, gathered_state
from fedsafe.peers import Peers


class PartitionedAdapter(FlatAdapter):
    """An adapter whose optimizer works on a part of it on each rank; all ranks call together.

    Args:
        named_parameters: ``(name, parameter)`` pairs.
        zero: DeepSpeed's optimizer; None where nothing is trained.
        peers: The ranks that it is split over.
        device: Where vectors are; the parts may be kept elsewhere.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        zero: Any,
        peers: Peers,
        device: torch.device,
    ) -> None:
        super().__init__(named_parameters)
        self._zero = zero
        self._peers = peers
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where vectors are, whatever is kept on the CPU."""
        return self._device

    @abstractmethod
    def _part_of_rank(self) -> Tensor:
        """The optimizer's own copy of this rank's part, flat, with padding."""

    @abstractmethod
    def _cut(self, vector: Tensor) -> Tensor:
        """This rank's part of a vector, as the optimizer has it."""

    @abstractmethod
    def _join(self, part: Tensor) -> Tensor:
        """The whole vector of every rank's part."""

    def _whole(self) -> AbstractContextManager[None]:
        """Makes the parameters whole for a while; what is written to them then stays."""
        return nullcontext()

    @torch.no_grad()
    def read(self) -> Tensor:
        """See `FlatAdapter`."""
        vector = self.empty()
        with self._whole():
            torch._foreach_copy_(self.views(vector), self.parameters)
        return vector

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """See `FlatAdapter`."""
        with self._whole():
            torch._foreach_copy_(self.parameters, self.views(vector))
        if self._zero is not None:
            self._part_of_rank().copy_(self._cut(vector))

    @torch.no_grad()
    def read_gradient(self) -> Tensor:
        """See `FlatAdapter`."""
        from deepspeed.utils import safe_get_full_grad

        vector = self.empty()
        gradients = [safe_get_full_grad(parameter) for parameter in self.parameters]
        torch._foreach_copy_(self.views(vector), gradients)
        return vector

    @torch.no_grad()
    def write_gradient(self, vector: Tensor) -> None:
        """See `FlatAdapter`."""
        for parameter, gradient in zip(self.parameters, self.views(vector), strict=True):
            self._write_gradient(parameter, gradient)

    @abstractmethod
    def _write_gradient(self, parameter: Tensor, gradient: Tensor) -> None: ...

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._zero.optimizer.state[self._part_of_rank()]
        return state

    @torch.no_grad()
    def forget(self, optimizer: Optimizer) -> None:
        """See `FlatAdapter`."""
        for value in self._state().values():  # in place: DeepSpeed has views of these tensors
            value.zero_()

    @torch.no_grad()
    def optimizer_state(self, optimizer: Optimizer) -> OptimizerState:
        """See `FlatAdapter`."""
        state = self._state()
        if not state or not state[STEP]:
            return {}
        return gathered_state([state], lambda parts: self._join(parts[0]))

    @torch.no_grad()
    def load_optimizer_state(self, optimizer: Optimizer, state: OptimizerState) -> None:
        """See `FlatAdapter`."""
        own, device = self._state(), self._part_of_rank().device
        self.forget(optimizer)
        for name, value in state.items():
            part = value.clone() if name == STEP else self._cut(value.to(self.device)).to(device)
            if name in own:
                own[name].copy_(part)
            else:
                own[name] = part


class PartlyPartitionedAdapter(PartitionedAdapter):
    """ZeRO-1 and ZeRO-2: each rank holds the adapter whole, and updates a part of it.

    The optimizer's copy is one vector of all tensors in order, padded and cut into equal parts.
    """

    def _part_of_rank(self) -> Tensor:
        (part,) = self._zero.single_partition_of_fp32_groups
        assert isinstance(part, Tensor)
        return part

    def _cut(self, vector: Tensor) -> Tensor:
        size = self._part_of_rank().numel()
        part = vector.new_zeros(size)
        kept = vector[self._peers.index * size :][:size]
        part[: len(kept)] = kept
        return part

    def _join(self, part: Tensor) -> Tensor:
        size = part.numel()
        whole = torch.zeros(size * self._peers.size, dtype=part.dtype, device=self.device)
        whole[self._peers.index * size :][:size] = part.to(self.device)
        return self._peers.sum_(whole)[: self.num_params]

    def write_gradient(self, vector: Tensor) -> None:
        """See `FlatAdapter`."""
        super().write_gradient(vector)
        if not self._zero.cpu_offload:
            return
        gradient = self._part_of_rank().grad
        assert gradient is not None
        for parameter in self._zero.params_in_partition[0]:  # DeepSpeed clips by the norms it noted
            key = self._zero.get_param_id(parameter)
            *_, start, size = self._zero.grad_position[key]
            self._zero.norm_for_param_grads[key] = gradient[start : start + size].norm()

    def _write_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        from deepspeed.utils import safe_set_full_grad

        safe_set_full_grad(parameter, gradient)


class FullyPartitionedAdapter(PartitionedAdapter):
    """ZeRO-3: each rank holds a part of every tensor.

    The optimizer's copy is this rank's parts of all tensors, one after another, each padded to the
    same size on all ranks.
    """

    @staticmethod
    def whole_shape(parameter: Tensor) -> torch.Size:
        """See `FlatAdapter`; the parameter itself is empty while it is in parts."""
        shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
        return shape

    def _whole(self) -> AbstractContextManager[None]:
        from deepspeed import zero

        gathered: AbstractContextManager[None] = zero.GatheredParameters(
            self.parameters, modifier_rank=0
        )
        return gathered

    def _part_of_rank(self) -> Tensor:
        (part,) = self._zero.fp32_partitioned_groups_flat
        assert isinstance(part, Tensor)
        return part

    @property
    def _part_sizes(self) -> list[int]:
        return [-(-size // self._peers.size) for size in self._sizes]

    def _piece(self, tensor: Tensor) -> Tensor:
        """This rank's part of one tensor."""
        size = -(-tensor.numel() // self._peers.size)
        piece = tensor.new_zeros(size)
        kept = tensor.flatten()[self._peers.index * size :][:size]
        piece[: len(kept)] = kept
        return piece

    def _cut(self, vector: Tensor) -> Tensor:
        return torch.cat([self._piece(view) for view in self.views(vector)])

    def _join(self, part: Tensor) -> Tensor:
        vector = torch.zeros(self.num_params, dtype=part.dtype, device=self.device)
        pieces = part.to(self.device).split(self._part_sizes)
        for view, piece in zip(self.views(vector), pieces, strict=True):
            place = view.flatten()[self._peers.index * len(piece) :][: len(piece)]
            place.copy_(piece[: len(place)])
        return self._peers.sum_(vector)

    def _write_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        from deepspeed.utils import safe_set_local_grad

        safe_set_local_grad(parameter, self._piece(gradient))
