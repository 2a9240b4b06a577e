"""Several ranks that are one resident trainer: the first hands each letter to the others."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

_STEP_SECONDS = timedelta(hours=2)
"""How long a rank waits for the others in the middle of work."""

_IDLE = timedelta(days=3650)
"""How long it waits for a letter: for ever."""


class Ranks:
    """The ranks of this trainer; alone unless torchrun started several.

    Ranks wait for letters in a group of their own, whose patience is not that of training.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.index = int(os.environ.get("RANK", "0"))
        self._launcher = os.getppid()
        self._idle: dist.ProcessGroup | None = None
        if self.size == 1:
            return
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_STEP_SECONDS)
        self._idle = dist.new_group(backend="gloo", timeout=_IDLE)

    @property
    def are_left_alone(self) -> bool:
        """Whether who started several ranks is gone: nobody would end them."""
        return self.size > 1 and os.getppid() != self._launcher

    def hand(self, data: bytes) -> bytes:
        """What the first rank gives, on all; none is the sign to end.

        Args:
            data: Given by the first rank; the others' does not matter.
        """
        if self.size == 1:
            return data
        length = torch.tensor([len(data)])
        dist.broadcast(length, src=0, group=self._idle)
        if self.index == 0:
            values = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None
        else:
            values = torch.empty(int(length), dtype=torch.uint8) if int(length) else None
        if values is None:
            return b""
        dist.broadcast(values, src=0, group=self._idle)
        return values.numpy().tobytes()

    def follow(self, answer: Callable[[bytes], object]) -> None:
        """On another rank than the first: do what it does, until it ends."""
        while data := self.hand(b""):
            answer(data)

    def part(self) -> None:
        """The first rank ends, and lets the others."""
        if self.size > 1:
            if self.index == 0:
                self.hand(b"")
            dist.destroy_process_group()
