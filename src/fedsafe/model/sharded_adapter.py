"""The adapter where FSDP2 splits every tensor over a group of ranks.

Each rank keeps a run of rows of each tensor: of ``n`` rows over ``s`` ranks, rank ``k`` has the
``ceil(n / s)`` from ``k * ceil(n / s)`` on, fewer or none at the end. These are slices of the flat
vector: writing needs no communication, and reading one message for all tensors.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from fedsafe.model.flat_adapter import (
    STEP,
    FlatAdapter,
    OptimizerState,
    gathered_state,
    present_gradients,
)


class _Run(NamedTuple):
    """What one rank keeps of one tensor, as a slice of the flat vector."""

    start: int
    length: int


class ShardedAdapter(FlatAdapter):
    """An adapter of which each rank of a group holds some rows of every tensor.

    Args:
        named_parameters: ``(name, parameter)`` pairs; those that need no gradient are left out.

    Raises:
        ValueError: If a parameter is not split over ranks.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        super().__init__(named_parameters)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if not isinstance(parameter, DTensor):
                raise ValueError(
                    f"{name} is whole on each rank, so the model was built under another strategy; "
                    "give the Trainer a new LoraLM"
                )
            assert parameter.placements == (Shard(0),)
        first = self.parameters[0]
        assert isinstance(first, DTensor)
        mesh = first.device_mesh
        self._group, self._index, self._num_ranks = (
            mesh.get_group(),
            mesh.get_local_rank(),
            mesh.size(),
        )
        self._rooms = [self._rows(shape) * shape[1:].numel() for shape in self.shapes]
        self._runs = [self._runs_of(rank) for rank in range(self._num_ranks)]

    @torch.no_grad()
    def read(self) -> Tensor:
        """See `FlatAdapter`."""
        return self._gathered(self.parameters)

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """See `FlatAdapter`."""
        self._scatter(vector, self.parameters)

    @torch.no_grad()
    def read_gradient(self) -> Tensor:
        """See `FlatAdapter`."""
        return self._gathered(present_gradients(self))

    @torch.no_grad()
    def write_gradient(self, vector: Tensor) -> None:
        """See `FlatAdapter`."""
        self._scatter(vector, present_gradients(self))

    def forget(self, optimizer: Optimizer) -> None:
        """See `FlatAdapter`."""
        optimizer.state.clear()

    @torch.no_grad()
    def optimizer_state(self, optimizer: Optimizer) -> OptimizerState:
        """See `FlatAdapter`."""
        return gathered_state([optimizer.state.get(p, {}) for p in self.parameters], self._gathered)

    @torch.no_grad()
    def load_optimizer_state(self, optimizer: Optimizer, state: OptimizerState) -> None:
        """See `FlatAdapter`."""
        optimizer.state.clear()
        for name, vector in state.items():
            if name == STEP:
                for parameter in self.parameters:
                    optimizer.state[parameter][STEP] = vector.clone()
                continue
            moments = [torch.zeros_like(parameter) for parameter in self.parameters]
            self._scatter(vector.to(self.device), moments)
            for parameter, moment in zip(self.parameters, moments, strict=True):
                optimizer.state[parameter][name] = moment

    def _gathered(self, tensors: Sequence[Tensor]) -> Tensor:
        """One vector of tensors that are split as the parameters are."""
        own = torch.zeros(sum(self._rooms), device=self.device)
        torch._foreach_copy_(self._filled(own, self._index), _local(tensors))
        everyones = [torch.empty_like(own) for _ in self._runs]
        dist.all_gather(everyones, own, group=self._group)
        vector = self.empty()
        for rank, part in enumerate(everyones):
            torch._foreach_copy_(self._slices(vector, rank), self._filled(part, rank))
        return vector

    def _scatter(self, vector: Tensor, tensors: Sequence[Tensor]) -> None:
        """Overwrite this rank's rows of tensors that are split as the parameters are."""
        torch._foreach_copy_(_local(tensors), self._slices(vector, self._index))

    def _rows(self, shape: torch.Size) -> int:
        """Rows of a tensor that a rank has room for."""
        return -(-shape[0] // self._num_ranks)

    def _runs_of(self, rank: int) -> list[_Run]:
        runs, offset = [], 0
        for shape, room in zip(self.shapes, self._rooms, strict=True):
            begin, end = (min(place * room, shape.numel()) for place in (rank, rank + 1))
            runs.append(_Run(offset + begin, end - begin))
            offset += shape.numel()
        return runs

    def _slices(self, vector: Tensor, rank: int) -> list[Tensor]:
        """What a rank keeps, in the vector of all."""
        return [vector.narrow(0, *run) for run in self._runs[rank]]

    def _filled(self, rooms: Tensor, rank: int) -> list[Tensor]:
        """What a rank keeps, in a vector with equal room for every rank's rows."""
        pairs = zip(rooms.split(self._rooms), self._runs[rank], strict=True)
        return [room[: run.length] for room, run in pairs]


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's rows, flat; they share the tensors' memory."""
    return [tensor.to_local().view(-1) for tensor in tensors if isinstance(tensor, DTensor)]
