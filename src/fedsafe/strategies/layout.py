"""`Layout`: which part of a run's work a rank has, under each strategy.

Three kinds of work are shared out. Clients: groups of ranks train different clients at once. A
client's steps: the ranks of a group train on parts of the same samples. Work without gradients
(guard, revision, evaluation): each whole copy of the base, a replica, takes some of the items; the
ranks that hold one replica together do the same in lock-step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from peft import PeftModel
from torch import nn

from fedsafe.federated.exchange import ExchangeMode
from fedsafe.model.flat_adapter import FlatAdapter, WholeAdapter
from fedsafe.peers import ALONE, Peers

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """With whom a rank does which part of the work.

    Attributes:
        clients: The counterparts of this rank in the groups that train other clients at the same
            time; alone where there is one group.
        data: The ranks of this rank's group, which share the samples of every step.
        replicas: One rank of each whole copy of the base.
        world: All ranks.
    """

    clients: Peers = ALONE
    data: Peers = ALONE
    replicas: Peers = ALONE
    world: Peers = ALONE

    @property
    def replica(self) -> Peers:
        """The ranks that hold this rank's copy of the base together."""
        return ALONE if self.replicas.size == self.world.size else self.data


ONE_RANK = Layout()
"""One process does everything."""


class LaidOut(ABC):
    """A strategy of fedsafe's own, which knows its layout."""

    exchange: ExchangeMode = "sums"

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Who does what; known once the processes have found each other."""

    def flat_adapter(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> FlatAdapter:
        """Access to the adapter as this strategy keeps it."""
        return WholeAdapter(named_parameters)

    def build(self, make: Callable[[], PeftModel]) -> PeftModel:
        """The model as this strategy keeps it; all ranks call.

        Args:
            make: Makes the base with its adapter, whole and on the CPU; a strategy that keeps parts
                need not call it on every rank.
        """
        return make()

    def call_inside(self, base: nn.Module, function: Callable[[], T]) -> T:
        """Call a function that runs parts of the base, or uses its output layer's weight, directly.

        Calling the base itself needs no help.
        """
        return function()

    def whole(self, module: nn.Module) -> AbstractContextManager[None]:
        """Makes a module's own weights whole for a while, for use without calling the module."""
        return nullcontext()


def layout_of(strategy: Strategy) -> Layout:
    """Who does what under a strategy.

    Raises:
        ValueError: If fedsafe does not know the strategy.
    """
    if isinstance(strategy, LaidOut):
        return strategy.layout
    if isinstance(strategy, SingleDeviceStrategy):
        return Layout()
    if type(strategy) is DDPStrategy:
        everyone = Peers(strategy.global_rank, strategy.world_size)
        return Layout(data=everyone, replicas=everyone, world=everyone)
    raise ValueError(
        f"rounds cannot run under {type(strategy).__name__}, whose adapter fedsafe cannot read and "
        "write; take one of configs/strategy: ddp, fsdp, zero1, zero2, zero3, clients"
    )


def exchange_of(strategy: Strategy) -> ExchangeMode:
    """What groups of ranks tell each other at the end of a round; one group has nobody to tell."""
    return strategy.exchange if isinstance(strategy, LaidOut) else "sums"


def flat_adapter_under(
    strategy: Strategy | None, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> FlatAdapter:
    """Access to the adapter as a strategy keeps it; None is no strategy at all."""
    if isinstance(strategy, LaidOut):
        return strategy.flat_adapter(named_parameters)
    return WholeAdapter(named_parameters)


def built_under(strategy: Strategy | None, make: Callable[[], PeftModel]) -> PeftModel:
    """The model as a strategy keeps it; see `LaidOut.build`."""
    return strategy.build(make) if isinstance(strategy, LaidOut) else make()


def called_inside(strategy: Strategy | None, base: nn.Module, function: Callable[[], T]) -> T:
    """What a function returns that runs parts of the base directly; see `LaidOut.call_inside`."""
    if isinstance(strategy, LaidOut):
        return strategy.call_inside(base, function)
    return function()


def whole_under(strategy: Strategy | None, module: nn.Module) -> AbstractContextManager[None]:
    """A module's own weights, whole for a while; see `LaidOut.whole`."""
    return strategy.whole(module) if isinstance(strategy, LaidOut) else nullcontext()
