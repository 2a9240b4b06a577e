"""Who trains in round t, and on which samples: pure functions of (seed, round, client).

Nothing here depends on what was drawn before, so a resumed run, a run with the clients in another
order and a client on another machine all draw the same samples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsafe.federated.partition import Partition
from fedsafe.federated.sharing import WHOLE, Share, balanced

SERVER = -1
"""Number of the server among the clients, for the batch that stands for its own training."""

NOBODY = -2
"""In the place of a client, for a batch in which a rank waits for the others."""

ServerVisitRounds = Literal["none", "every", "last"]
"""The rounds after whose aggregation the server trains."""


class Stream(IntEnum):
    """What a draw is for; one independent random stream each."""

    CLIENTS = 1
    FAILURE = 2
    SAMPLES = 3
    DROPOUT = 4
    RED_TEAM = 5
    SERVER_SAMPLES = 6
    PRINCIPLE = 7
    SPEECH = 8
    SERVER_DROPOUT = 9
    REVISION = 10
    PROBE = 11
    EVALUATION = 12


def random_stream(stream: Stream, *key: int) -> np.random.Generator:
    """Independent generator for one purpose and one key, usually ``(seed, round, client)``."""
    return np.random.default_rng([stream, *key])


def derive_seed(stream: Stream, *key: int) -> int:
    """Seed of 63 bits for one purpose and one key, where a whole generator would be dear."""
    text = repr((int(stream), *key)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest()) >> 1


class Visit(NamedTuple):
    """One client's local training inside a round."""

    round: int
    number: int
    """Position among the round's visits, from 0."""
    client: int
    num_steps: int
    """Optimizer steps; 0 for a client that fails."""
    failed: bool


class BatchKey(NamedTuple):
    """Everything that decides one batch: which samples, and where in the run it stands."""

    round: int
    """From 0."""
    num_rounds: int
    visit: int
    """Position of the visit in its round, from 0."""
    client: int
    """Number of the client, from 0."""
    step: int
    """Optimizer step inside the visit, from 0."""
    num_steps: int
    micro: int
    """Part of the step, from 0, where gradients are accumulated."""
    num_micro: int
    samples: NDArray[np.int64]
    """Samples of this batch, shape ``(num_samples,)``; none if the step has fewer than parts."""
    step_samples: NDArray[np.int64]
    """Samples of the whole optimizer step; the loss is their mean over answer tokens."""
    rank: int = 0
    """Which of the ranks that share the step, from 0."""
    num_ranks: int = 1

    @property
    def part(self) -> int:
        """Which part of the optimizer step, from 0."""
        return self.micro * self.num_ranks + self.rank

    @property
    def num_parts(self) -> int:
        """Parts of the optimizer step: accumulated one after another, or by ranks at once."""
        return self.num_micro * self.num_ranks

    @property
    def is_idle(self) -> bool:
        """Whether this changes nothing: other ranks, or other machines, train meanwhile."""
        return self.client == NOBODY

    @property
    def is_server_visit(self) -> bool:
        """Whether this stands for the server's own training; there are no samples in it."""
        return self.client == SERVER

    @property
    def starts_visit(self) -> bool:
        """Whether this is the first batch of its visit."""
        return self.step == 0 and self.micro == 0

    @property
    def ends_visit(self) -> bool:
        """Whether the visit's last optimizer step follows this batch."""
        return self.step == self.num_steps - 1 and self.micro == self.num_micro - 1


@dataclass(frozen=True)
class RoundPlan:
    """The visits of one round, in order, and the batches of those that fall to one rank.

    All ranks have the same number of batches; one whose visits are over idles. Where clients train
    elsewhere, all of their visits are one idle batch here. A server visit is one batch without
    samples, after all others: how many steps it takes is not known when the round begins.
    """

    schedule: "Schedule"
    round: int
    visits: list[Visit]
    has_server_visit: bool = False

    @cached_property
    def owners(self) -> dict[int, int]:
        """The group of ranks that trains each client that does not fail, in the round's order."""
        visits = [visit for visit in self.visits if not visit.failed]
        costs = [self.schedule.num_tokens(visit) for visit in visits]
        groups = balanced(costs, self.schedule.share.num_groups)
        return {visit.client: group for visit, group in zip(visits, groups, strict=True)}

    @cached_property
    def _own_visits(self) -> list[Visit]:
        if self.schedule.elsewhere:
            return []
        return [v for v in self.visits if self.owners.get(v.client) == self.schedule.share.group]

    @cached_property
    def _ends(self) -> list[int]:
        """This rank's batches up to and including each of its visits."""
        return list(accumulate(self._num_batches(visit) for visit in self._own_visits))

    @cached_property
    def num_client_batches(self) -> int:
        """Batches of the round for clients, on any rank: of the group with the most."""
        if self.schedule.elsewhere:
            return 1
        sums = [0] * self.schedule.share.num_groups
        for visit in self.visits:
            if not visit.failed:
                sums[self.owners[visit.client]] += self._num_batches(visit)
        return max(sums)

    def _num_batches(self, visit: Visit) -> int:
        return visit.num_steps * self.schedule.num_micro

    def __len__(self) -> int:
        """Number of batches in the round."""
        return self.num_client_batches + self.has_server_visit

    def batches(self, *, start: int = 0) -> Iterator[BatchKey]:
        """The rank's batches of the round from number `start` on, without drawing those before."""
        for visit, end in zip(self._own_visits, self._ends, strict=True):
            if start < end:
                begin = end - self._num_batches(visit)
                yield from self.schedule.batches_of(visit, start=max(0, start - begin))
        busy = self._ends[-1] if self._ends else 0
        for _ in range(max(start, busy), self.num_client_batches):
            yield self._empty_key(NOBODY)
        if self.has_server_visit and start < len(self):
            yield self._empty_key(SERVER)

    def _empty_key(self, client: int) -> BatchKey:
        none = np.zeros(0, dtype=np.int64)
        return BatchKey(
            round=self.round,
            num_rounds=self.schedule.num_rounds,
            visit=len(self.visits),
            client=client,
            step=0,
            num_steps=1,
            micro=0,
            num_micro=1,
            samples=none,
            step_samples=none,
        )


@dataclass(frozen=True)
class Schedule:
    """The plan of a whole run; planning a round costs the same for ten and for a million clients.

    Args:
        partition: Which samples belong to which client.
        num_rounds: Rounds of the run, >= 1.
        clients_per_round: Clients sampled without replacement each round, 1 to the number of those
            that hold a sample.
        batch_size: Samples of one optimizer step, >= 1.
        local_steps: Optimizer steps of a visit; the samples are reshuffled whenever all were seen.
            Give this or `local_epochs`.
        local_epochs: Passes over the client's samples in a visit; the last batch of a pass may be
            smaller.
        num_micro: Parts that each optimizer step is split into (gradient accumulation).
        failure_probability: Chance that a sampled client fails and returns nothing, 0 to 1.
        seed: Seed of every draw.
        server_visits: Rounds in which the server trains too.
        sample_tokens: Tokens of each sample, shape ``(num_samples,)``, by which visits are spread
            evenly over groups of ranks; None counts each sample as one.
        share: What falls to this rank.
        elsewhere: Clients train on other machines. Which of them are there is known only when a
            round begins: fewer than `clients_per_round` are all sampled.

    Raises:
        ValueError: If a number is out of range, or not exactly one of `local_steps` and
            `local_epochs` is given.
    """

    partition: Partition
    num_rounds: int
    clients_per_round: int
    batch_size: int
    local_steps: int | None = None
    local_epochs: int | None = None
    num_micro: int = 1
    failure_probability: float = 0.0
    seed: int = 0
    server_visits: ServerVisitRounds = "none"
    sample_tokens: NDArray[np.int32] | None = None
    share: Share = WHOLE
    elsewhere: bool = False

    def __post_init__(self) -> None:
        """Check what the user chose."""
        num_holding = self.partition.num_holding
        enough = self.elsewhere or self.clients_per_round <= num_holding
        if self.clients_per_round < 1 or not enough:
            all_clients = len(self.partition)
            there_are = (
                f"there are {all_clients} clients"
                if num_holding == all_clients
                else f"the safety filter leaves {num_holding} of {all_clients} clients a sample"
            )
            raise ValueError(
                f"clients_per_round is {self.clients_per_round}, but {there_are}; choose 1 to "
                f"{num_holding}"
            )
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError(
                "give local_steps or local_epochs, not both or none; "
                f"got local_steps={self.local_steps} and local_epochs={self.local_epochs}"
            )
        for name in ("num_rounds", "batch_size", "local_steps", "local_epochs", "num_micro"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        if not 0 <= self.failure_probability <= 1:
            raise ValueError(f"failure_probability is {self.failure_probability}; give 0 to 1")

    def plan(self, round_: int) -> RoundPlan:
        """The visits of round `round_` (from 0), clients in ascending order.

        The set is drawn first and then sorted, so that the order of visits carries no randomness of
        its own.
        """
        rng = random_stream(Stream.CLIENTS, self.seed, round_)
        there = len(self._holding)
        drawn = rng.choice(there, min(self.clients_per_round, there), replace=False)
        clients = sorted(self._holding[drawn].tolist())
        visits = [self._visit(round_, number, client) for number, client in enumerate(clients)]
        last = round_ == self.num_rounds - 1
        visits_server = self.server_visits == "every" or (self.server_visits == "last" and last)
        return RoundPlan(self, round_, visits, visits_server)

    @cached_property
    def _holding(self) -> NDArray[np.int64]:
        """The clients that hold a sample."""
        return np.flatnonzero(self.partition.sizes)

    def _visit(self, round_: int, number: int, client: int) -> Visit:
        failed = False
        if self.failure_probability > 0:
            draw = random_stream(Stream.FAILURE, self.seed, round_, client).random()
            failed = draw < self.failure_probability
        return Visit(round_, number, client, 0 if failed else self.num_steps(client), failed)

    def num_steps(self, client: int) -> int:
        """Optimizer steps of one visit to `client`."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        return self.local_epochs * -(-len(self.partition.samples_of(client)) // self.batch_size)

    def num_tokens(self, visit: Visit) -> float:
        """Tokens that a visit trains on, about."""
        samples = self.partition.samples_of(visit.client)
        tokens = 1.0 if self.sample_tokens is None else float(self.sample_tokens[samples].mean())
        return visit.num_steps * min(self.batch_size, len(samples)) * tokens

    def mean_steps(self) -> float:
        """Optimizer steps of one visit, averaged over the clients that hold a sample."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.local_epochs is not None
        sizes = self.partition.sizes
        return self.local_epochs * float(np.mean(-(-sizes[sizes > 0] // self.batch_size)))

    def in_one_place(self) -> "Schedule":
        """One client with everything, and as many steps a round as this takes on average."""
        one = replace(
            self.partition, offsets=np.array([0, len(self.partition.order)]), names=("everyone",)
        )
        steps = max(1, round(self.clients_per_round * self.mean_steps()))
        return replace(
            self, partition=one, clients_per_round=1, local_steps=steps, local_epochs=None
        )

    def batches_of(self, visit: Visit, *, start: int = 0) -> Iterator[BatchKey]:
        """The batches of one visit from number `start` on."""
        shuffled = lru_cache(maxsize=2)(partial(self._shuffled, visit))
        rank, num_ranks = self.share.rank, self.share.num_ranks
        for number in range(start, visit.num_steps * self.num_micro):
            step, micro = divmod(number, self.num_micro)
            step_samples = self._samples_of_step(visit, step, shuffled)
            yield BatchKey(
                round=visit.round,
                num_rounds=self.num_rounds,
                visit=visit.number,
                client=visit.client,
                step=step,
                num_steps=visit.num_steps,
                micro=micro,
                num_micro=self.num_micro,
                samples=step_samples[micro * num_ranks + rank :: self.num_micro * num_ranks],
                step_samples=step_samples,
                rank=rank,
                num_ranks=num_ranks,
            )

    def _samples_of_step(
        self, visit: Visit, step: int, shuffled: Callable[[int], NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """Samples of one optimizer step: a slice of an endless stream of shuffled passes."""
        size = len(self.partition.samples_of(visit.client))
        if self.local_epochs is not None:
            steps_per_epoch = -(-size // self.batch_size)
            epoch, position = divmod(step, steps_per_epoch)
            begin = position * self.batch_size
            return shuffled(epoch)[begin : begin + self.batch_size]
        begin, end = step * self.batch_size, (step + 1) * self.batch_size
        passes = [shuffled(epoch) for epoch in range(begin // size, -(-end // size))]
        offset = begin // size * size
        return np.concatenate(passes)[begin - offset : end - offset]

    def _shuffled(self, visit: Visit, epoch: int) -> NDArray[np.int64]:
        """The client's samples in the order of one local epoch."""
        rng = random_stream(Stream.SAMPLES, self.seed, visit.round, visit.client, epoch)
        return rng.permutation(self.partition.samples_of(visit.client))


def num_sampled(clients_per_round: float, num_clients: int) -> int:
    """Clients per round as a number.

    Args:
        clients_per_round: A whole number, or a share up to 1.0.
        num_clients: Clients that there are.

    Raises:
        ValueError: If a share is out of range.
    """
    if isinstance(clients_per_round, int):
        return clients_per_round
    if not 0 < clients_per_round <= 1:
        raise ValueError(
            f"clients_per_round is {clients_per_round}; give a whole number of clients, or a share "
            "of them above 0 and up to 1.0"
        )
    return max(1, round(clients_per_round * num_clients))
