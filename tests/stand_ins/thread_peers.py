"""Peers that are threads of one process: what ranks tell each other, without starting any."""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import TypeVar

from torch import Tensor

from fedsafe.peers import Peers

T = TypeVar("T")


class Meeting:
    """Where the threads lay down what they have to say."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size, timeout=20)
        self.said: list[bytes] = [b""] * size


@dataclass(frozen=True)
class ThreadPeers(Peers):
    """One thread among some."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, value: T) -> list[T]:
        self.meeting.said[self.index] = pickle.dumps(value)
        self.meeting.barrier.wait()
        values = [pickle.loads(each) for each in self.meeting.said]
        self.meeting.barrier.wait()
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        first, *others = self.gather(tensor)
        return tensor.copy_(sum(others, start=first))

    def broadcast_(self, tensor: Tensor, *, source: int) -> Tensor:
        return tensor.copy_(self.gather(tensor)[source])


def together(size: int, work: Callable[[Peers], T]) -> list[T]:
    """What each of `size` threads returns; an error in any of them is raised."""
    meeting = Meeting(size)

    def alone(index: int) -> T:
        try:
            return work(ThreadPeers(index, size, meeting=meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(alone, index) for index in range(size)]
    errors = [future.exception() for future in futures]
    first = next((e for e in errors if e is not None and "Broken" not in type(e).__name__), None)
    if first is not None:
        raise first
    return [future.result() for future in futures]
