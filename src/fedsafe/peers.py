"""`Peers`: some of the processes of a run that do a part of its work together.

A process is called a rank, as torch and its launchers do. Alone, every operation leaves things as
they are, so that what works together reads the same in one process as in many.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """The ranks that work together on something, this one among them.

    Every operation must be called by all of them, in the same order.

    Attributes:
        index: Which of them this rank is, from 0.
        size: How many they are.
        group: torch's process group of them; None is all ranks of the run, or this one alone.
    """

    index: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in the order of their indices."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by the sum over all; all have the same bits then."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast_(self, tensor: Tensor, *, source: int) -> Tensor:
        """Replace the tensor by that of the peer with index `source`."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def share_of(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's items, dealt like cards: number `index`, `index + size`, ..."""
        return items[self.index :: self.size]

    def wait(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            dist.barrier(group=self.group)


ALONE = Peers()
"""One process."""
