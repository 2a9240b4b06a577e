"""From plans to packed batches: what each visit, and each evaluation, is served."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from fedsafe.data.packing import Pack, TrainingBatch, pack, pack_batch, split_by_budget
from fedsafe.data.tokens import TokenStore
from fedsafe.federated.schedule import BatchKey, RoundPlan
from fedsafe.peers import ALONE, Peers

_EVALUATION_TOKENS = 8192


@dataclass
class EvaluationBatch(Pack):
    """A pack of validation or test samples.

    Attributes:
        client: Whose adapter to evaluate; negative for the server's.
    """

    client: int


def visits_loader(
    store: TokenStore, plan: RoundPlan, *, done: int, num_workers: int
) -> DataLoader[TrainingBatch]:
    """The batches of a round from number `done` on."""
    return DataLoader(
        _TrainingPacks(store),
        sampler=_RestOfRound(plan, done=done),
        batch_size=None,
        num_workers=num_workers,
    )


def evaluation_loader(
    store: TokenStore, samples: NDArray[np.int64], clients: Sequence[int], peers: Peers = ALONE
) -> DataLoader[EvaluationBatch]:
    """Packs of `samples`, all of them once for each of `clients`.

    Args:
        store: Where the samples are.
        samples: Which ones.
        clients: Whose adapters; they are looked up when a batch is made, and may change until then,
            their number may not.
        peers: Ranks that share the packs, dealt like cards. All go through as many, some of which
            may hold no sample, and are at the same client at the same time.
    """
    groups = split_by_budget(store.lengths[samples], max_tokens=_EVALUATION_TOKENS)
    packs = [samples[group] for group in groups]
    # in this process, which sees the clients change: Lightning would not ask for another loader
    dealt = [packs[begin : begin + peers.size] for begin in range(0, len(packs), peers.size)]
    mine = [some[peers.index] if peers.index < len(some) else samples[:0] for some in dealt]
    return DataLoader(_EvaluationPacks(store, mine, clients), batch_size=None, num_workers=0)


class _RestOfRound(Sampler[BatchKey]):
    """Batches of a round from number `done` on.

    Its length is the whole round's: Lightning restores its own counter of batches and compares it
    with the length.
    """

    def __init__(self, plan: RoundPlan, *, done: int) -> None:
        self.plan = plan
        self.done = done

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[BatchKey]:
        return self.plan.batches(start=self.done)


class _TrainingPacks(Dataset[TrainingBatch]):
    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def __getitem__(self, key: BatchKey) -> TrainingBatch:
        return pack_batch(self.store, key)


class _EvaluationPacks(Dataset[EvaluationBatch]):
    """A rank's packs, once for each of `clients`, who are looked up when a batch is made."""

    def __init__(
        self, store: TokenStore, packs: Sequence[NDArray[np.int64]], clients: Sequence[int]
    ) -> None:
        self.store = store
        self.packs = packs
        self.clients = clients

    def __len__(self) -> int:
        return len(self.packs) * len(self.clients)

    def __getitem__(self, index: int) -> EvaluationBatch:
        number, place = divmod(index, len(self.packs))
        packed = pack([self.store[i] for i in self.packs[place].tolist()])
        return EvaluationBatch(**vars(packed), client=self.clients[number])
