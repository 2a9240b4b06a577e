"""`Peers`: some of the processes of a run that do a part of its work together.

A process is called a rank, as torch and its launchers do. Alone, every operation leaves things as
they are, so that what works together reads the same in one process as in many.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Unit = TypeVar("Unit")

_SHARED_ERRORS = (ValueError, OSError)
"""What is wrong with data, settings or disks: one of several ranks finds it, all must know."""


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

    def gather_lists(self, values: Sequence[T]) -> list[T]:
        """Everyone's values one after the other, in the order of their indices."""
        return [value for some in self.gather(values) for value in some]

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

    def in_turns(self, units: Iterable[Unit], work: Callable[[Unit], T]) -> Iterator[T]:
        """Let peer ``i % size`` work on unit i; all get all results, in the order of the units.

        Everyone gives the same units. They go on together, `size` units at a time.

        Raises:
            ValueError: If work raises one, on whichever rank; so with OSError.
        """
        if self.size == 1:
            yield from map(work, units)
            return
        for some in groups_of(units, self.size):
            mine = [_tried(work, unit) for unit in some[self.index : self.index + 1]]
            for found in self.gather(mine)[: len(some)]:
                yield _checked(found[0])

    def from_first(self, work: Callable[[], T]) -> T:
        """What work gives the first of them, which alone does it.

        Raises:
            ValueError: If work raises one; so with OSError.
        """
        if self.size == 1:
            return work()
        mine = [_tried(lambda _: work(), None)] if self.index == 0 else []
        return _checked(self.gather(mine)[0][0])

    def wait(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            dist.barrier(group=self.group)


def groups_of(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items, `size` at a time; the last ones may be fewer."""
    stream = iter(items)
    while some := list(islice(stream, size)):
        yield some


@dataclass(frozen=True)
class _Failed:
    error: Exception


def _tried(work: Callable[[Unit], T], unit: Unit) -> T | _Failed:
    try:
        return work(unit)
    except _SHARED_ERRORS as error:
        return _Failed(error)


def _checked(found: T | _Failed) -> T:
    if isinstance(found, _Failed):
        raise found.error
    return found


ALONE = Peers()
"""One process."""
