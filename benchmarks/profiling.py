"""Where the CPU time of a fit goes: functions of fedsafe and Lightning, timed in place.

Each part's time excludes that of the parts that it calls, so the parts add up to the whole.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure

from fedsafe.data import loaders
from fedsafe.federated import run_files
from fedsafe.federated.local_training import LocalTraining
from fedsafe.federated.round_log import RoundLog
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.schedule import Schedule
from fedsafe.federated.server import Server
from fedsafe.model.module import LoraLM

COMPUTE = "forward, backward, optimizer"
REST = "Lightning: loops, hooks, data loader"

_TIMED: tuple[tuple[str, Any, str], ...] = (
    (COMPUTE, LoraLM, "forward"),
    (COMPUTE, torch.Tensor, "backward"),
    (COMPUTE, torch.optim.AdamW, "step"),
    (COMPUTE, torch.optim.AdamW, "zero_grad"),
    (REST, Closure, "closure"),
    ("LoraLM: loss in training_step", LoraLM, "training_step"),
    ("LoraLM: learning rate, dropout seed", LoraLM, "on_train_batch_start"),
    ("drawing the round and its batches", Schedule, "plan"),
    ("drawing the round and its batches", Schedule, "_samples_of_step"),
    ("packing batches", loaders, "pack_batch"),
    ("adapter in and out of the model", LocalTraining, "begin"),
    ("adapter in and out of the model", LocalTraining, "finish"),
    ("aggregation", Server, "receive"),
    ("aggregation", Server, "close_round"),
    ("files: adapter", run_files, "save_adapter"),
    ("files: rounds.jsonl", RoundLog, "append"),
    ("hooks of FederatedRounds", FederatedRounds, "on_train_epoch_end"),
    ("hooks of FederatedRounds", FederatedRounds, "on_train_batch_start"),
    ("hooks of FederatedRounds", FederatedRounds, "on_before_optimizer_step"),
    ("hooks of FederatedRounds", FederatedRounds, "on_train_batch_end"),
)


@dataclass
class Part:
    """One line of the breakdown."""

    cpu_seconds: float = 0.0
    calls: int = 0


@dataclass
class Breakdown:
    """CPU time by part; what is in no part is Lightning's."""

    parts: dict[str, Part] = field(default_factory=lambda: defaultdict(Part))
    total_cpu_seconds: float = 0.0
    _stack: list[str] = field(default_factory=list)
    _begun: float = 0.0
    _last: float = 0.0

    def clear(self) -> None:
        """Forget everything so far."""
        self.parts.clear()
        self._begun = self._last = time.process_time()

    def close(self) -> None:
        """Note the total."""
        self._charge()
        self.total_cpu_seconds = self._last - self._begun

    def enter(self, part: str) -> None:
        """From now on the time is this part's."""
        self._charge()
        self._stack.append(part)
        self.parts[part].calls += 1

    def leave(self) -> None:
        """The time is the caller's again."""
        self._charge()
        self._stack.pop()

    def sorted_parts(self) -> list[tuple[str, Part]]:
        """The parts, largest first."""
        return sorted(self.parts.items(), key=lambda item: -item[1].cpu_seconds)

    def _charge(self) -> None:
        now = time.process_time()
        self.parts[self._stack[-1] if self._stack else REST].cpu_seconds += now - self._last
        self._last = now


class Window(Callback):
    """Fills a breakdown with all rounds but the first ones; put it after `FederatedRounds`.

    Args:
        breakdown: Empty; complete when the fit is over.
        warm_up: Number of rounds to leave out, >= 1.
    """

    def __init__(self, breakdown: Breakdown, *, warm_up: int) -> None:
        self._breakdown = breakdown
        self._warm_up = warm_up

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin after the warm-up, and keep the total up to date."""
        if trainer.current_epoch + 1 == self._warm_up:
            self._breakdown.clear()
        self._breakdown.close()


@contextmanager
def break_down() -> Iterator[Breakdown]:
    """Time the parts of every fit inside the block."""
    breakdown = Breakdown()
    originals = [(owner, name, vars(owner).get(name)) for _, owner, name in _TIMED]
    for part, owner, name in _TIMED:
        setattr(owner, name, _timed(getattr(owner, name), breakdown, part))
    try:
        yield breakdown
    finally:
        for owner, name, original in originals:
            if original is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _timed(function: Callable[..., Any], breakdown: Breakdown, part: str) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        breakdown.enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            breakdown.leave()

    return timed
