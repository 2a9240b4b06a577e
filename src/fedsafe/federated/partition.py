"""Who holds which sample: the split of the training samples over clients.

References:
    Hsu, Qi and Brown (2019), Measuring the Effects of Non-Identical Data Distribution, section 3
    (Dirichlet). https://arxiv.org/abs/1909.06335
    Li, Diao, Chen and He (2022), Federated Learning on Non-IID Data Silos, section IV (quantity
    skew). https://arxiv.org/abs/2102.02079

Shapes: N samples, K clients.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

# One random stream per use, so that no draw here depends on how many another use has made.
_PARTITION_STREAM = 0x5041
_VALIDATION_STREAM = 0x5641

# Far beyond any use; some way above it, numpy's Dirichlet draws overflow and come out as zeros.
_MAX_ALPHA = 1e9


class SampleColumns(NamedTuple):
    """What a partitioner may look at: one entry per sample, never the text."""

    num_samples: int
    client: Sequence[str | None] | None = None
    label: Sequence[str | None] | None = None
    category: Sequence[str | None] | None = None


class NumberedNames(Sequence[str]):
    """The names `client-0`, `client-1`, …, made when asked for: a million take no memory."""

    def __init__(self, num_clients: int) -> None:
        """Keep only the count."""
        self._num_clients = num_clients

    def __len__(self) -> int:
        """Number of clients."""
        return self._num_clients

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Name of one client, or of a slice of them."""
        numbers = range(self._num_clients)[index]
        return f"client-{numbers}" if isinstance(numbers, int) else [f"client-{k}" for k in numbers]


@dataclass(frozen=True, eq=False)
class Partition:
    """Which samples each client holds, in compressed rows; every sample belongs to one client.

    Partitioners give every client a sample; the safety filter may leave some with none.

    Args:
        order: Sample numbers, client after client; shape `(N,)`.
        offsets: Client `k` holds `order[offsets[k]:offsets[k + 1]]`; shape `(K + 1,)`.
        names: One name per client.
    """

    order: IntArray
    offsets: IntArray
    names: Sequence[str]

    def __len__(self) -> int:
        """Number of clients."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> IntArray:
        """Number of samples of each client, shape `(K,)`."""
        return np.diff(self.offsets)

    @property
    def num_holding(self) -> int:
        """Number of clients that hold a sample."""
        return int(np.count_nonzero(self.sizes))

    def samples_of(self, client: int) -> IntArray:
        """Sample numbers of one client (from 0); a view, not a copy.

        Raises:
            IndexError: If there is no such client.
        """
        if not 0 <= client < len(self):
            raise IndexError(f"no client {client}: the partition has clients 0 to {len(self) - 1}")
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def sums(self, values: NDArray[np.generic]) -> IntArray:
        """Sum over each client's samples.

        Args:
            values: A whole number, or whether something holds, for each sample number.

        Returns:
            Shape `(K,)`; 0 where a client holds nothing.
        """
        ends = np.concatenate([[0], np.cumsum(values[self.order], dtype=np.int64)])
        return np.diff(ends[self.offsets])

    def renumbered(self, new: IntArray) -> "Partition":
        """The same clients with other samples in the places of theirs.

        Args:
            new: For each sample number the one that takes its place, or -1 to leave it out.
        """
        order = new[self.order]
        ends = np.concatenate([[0], np.cumsum(order >= 0, dtype=np.int64)])
        return Partition(order[order >= 0], ends[self.offsets], self.names)

    def digest(self) -> str:
        """SHA-256 of the split and the names: equal exactly where the partitions are equal."""
        digest = hashlib.sha256()
        digest.update(self.order.astype("<i8", copy=False).tobytes())
        digest.update(self.offsets.astype("<i8", copy=False).tobytes())
        if isinstance(self.names, NumberedNames):
            digest.update(b"numbered")
        else:
            digest.update("\0".join(self.names).encode())
        return digest.hexdigest()


class Partitioner(ABC):
    """A rule that gives every sample to exactly one client, and every client at least one."""

    @abstractmethod
    def __call__(self, columns: SampleColumns, *, seed: int) -> Partition:
        """Split the samples; the same columns and seed always give the same partition.

        Args:
            columns: What is known of the samples.
            seed: Non-negative; the only source of randomness.
        """


class IID(Partitioner):
    """Deal the shuffled samples out evenly: every client's data looks like everyone's.

    Args:
        num_clients: Number of clients, from 1 to the number of samples.
    """

    def __init__(self, num_clients: int) -> None:
        """Check the values."""
        self.num_clients = _positive(num_clients, "num_clients")

    def __call__(self, columns: SampleColumns, *, seed: int) -> Partition:
        """Split the samples; sizes differ by one at most."""
        _check_enough(columns.num_samples, num_clients=self.num_clients)
        base, extra = divmod(columns.num_samples, self.num_clients)
        sizes = np.full(self.num_clients, base, dtype=np.int64)
        sizes[:extra] += 1
        return _deal(sizes, rng=_generator(seed))


class Dirichlet(Partitioner):
    """Give each client its own mix: every category's shares over the clients are Dirichlet.

    A small `alpha` gives each category to a few clients, a large one approaches IID. A client that
    comes out with fewer than `min_samples` gets samples drawn from those that have more.

    Args:
        num_clients: Number of clients, from 1 to the number of samples.
        alpha: Concentration, above 0; 0.1 is very uneven, 100 nearly even.
        by: Column whose values are spread unevenly.
        min_samples: Least number of samples of a client, from 1.
    """

    def __init__(
        self,
        num_clients: int,
        alpha: float = 0.5,
        by: Literal["category", "label"] = "category",
        min_samples: int = 1,
    ) -> None:
        """Check the values."""
        if not 0 < alpha <= _MAX_ALPHA:
            raise ValueError(f"alpha is {alpha}; give a number above 0, at most {_MAX_ALPHA:g}")
        self.num_clients = _positive(num_clients, "num_clients")
        self.alpha = alpha
        self.by = by
        self.min_samples = _positive(min_samples, "min_samples")

    def __call__(self, columns: SampleColumns, *, seed: int) -> Partition:
        """Split the samples; raises ValueError if the column of `by` is missing or has gaps."""
        num_samples = columns.num_samples
        _check_enough(num_samples, num_clients=self.num_clients, min_samples=self.min_samples)
        values = columns.category if self.by == "category" else columns.label
        _, group_of = _groups(values, column=self.by, partitioner="Dirichlet")
        rng = _generator(seed)
        client_of = np.empty(num_samples, dtype=np.int64)
        for group in range(int(group_of.max()) + 1):
            samples = np.flatnonzero(group_of == group)
            shares = rng.dirichlet(np.full(self.num_clients, self.alpha))
            client_of[samples] = _draw_clients(shares, count=len(samples), rng=rng)
        _top_up(client_of, num_clients=self.num_clients, minimum=self.min_samples, rng=rng)
        return _from_clients(client_of, names=NumberedNames(self.num_clients))


class Quantity(Partitioner):
    """Deal shuffled samples out in unequal amounts: client sizes are log-normal.

    Args:
        num_clients: Number of clients, from 1 to the number of samples.
        sigma: Standard deviation of the logarithm of a client's size, from 0; 0 gives equal sizes,
            1 gives about two thirds of the clients between 0.4 and 2.7 times the median.
    """

    def __init__(self, num_clients: int, sigma: float = 1.0) -> None:
        """Check the values."""
        if not (sigma >= 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma is {sigma}; give a finite number from 0")
        self.num_clients = _positive(num_clients, "num_clients")
        self.sigma = sigma

    def __call__(self, columns: SampleColumns, *, seed: int) -> Partition:
        """Split the samples; every client gets one at least, however small its draw."""
        _check_enough(columns.num_samples, num_clients=self.num_clients)
        rng = _generator(seed)
        logs = self.sigma * rng.standard_normal(self.num_clients)
        weights = np.exp(logs - logs.max())
        sizes = _round_to_sum(columns.num_samples * weights / weights.sum())
        given, taken = _moves(sizes, minimum=1, rng=rng)
        return _deal(sizes + given - taken, rng=rng)


class Natural(Partitioner):
    """Keep the samples with the client that the data names: the `client` field."""

    def __call__(self, columns: SampleColumns, *, seed: int) -> Partition:
        """Split by name, clients in alphabetical order; the seed changes nothing."""
        names, client_of = _groups(columns.client, column="client", partitioner="Natural")
        return _from_clients(client_of, names=names)


class PartitionRow(NamedTuple):
    """One client's line in the table printed at the start of a run."""

    client: str
    samples: int
    tokens: int
    harmful_share: float | None
    """Share of its labelled samples that are unsafe, in [0, 1]; None where none is labelled."""


def partition_rows(
    partition: Partition,
    *,
    lengths: NDArray[np.integer],
    labels: Sequence[str | None] | None = None,
) -> list[PartitionRow]:
    """Figures per client: samples, tokens and, where labelled, the harmful share.

    Args:
        partition: The split.
        lengths: Tokens of each sample, shape `(N,)`.
        labels: `safe`, `unsafe` or None for each sample; None where the data has no labels.
    """
    tokens = partition.sums(lengths)
    unsafe = labelled = np.zeros(len(partition), dtype=np.int64)
    if labels is not None:
        label = np.asarray(labels, dtype=object)
        unsafe = partition.sums(label == "unsafe")
        labelled = unsafe + partition.sums(label == "safe")
    columns = zip(partition.names, partition.sizes, tokens, unsafe, labelled, strict=True)
    return [
        PartitionRow(name, int(size), int(length), int(harmful) / int(known) if known else None)
        for name, size, length, harmful, known in columns
    ]


def validation_split(num_samples: int, *, share: float, seed: int) -> tuple[IntArray, IntArray]:
    """Draw the samples kept for validation.

    Args:
        num_samples: Number of samples.
        share: Share kept for validation, in [0, 1); 0 keeps none.
        seed: Non-negative.

    Returns:
        Sample numbers for training and for validation, each ascending.

    Raises:
        ValueError: If the share is outside [0, 1), or leaves either side without a sample.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the validation share is {share}; give a number from 0 to below 1")
    num_val = round(share * num_samples)
    if (share > 0 and num_val == 0) or num_val >= num_samples:
        raise ValueError(
            f"a validation share of {share} of {num_samples} samples gives {num_val} for "
            "validation; both sides need one: change the share or add samples"
        )
    chosen = np.random.default_rng([seed, _VALIDATION_STREAM]).permutation(num_samples)[:num_val]
    is_val = np.zeros(num_samples, dtype=bool)
    is_val[chosen] = True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, _PARTITION_STREAM])


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; give a whole number from 1")
    return value


def _check_enough(num_samples: int, *, num_clients: int, min_samples: int = 1) -> None:
    if num_clients * min_samples > num_samples:
        raise ValueError(
            f"{num_clients} clients with at least {min_samples} sample(s) each need "
            f"{num_clients * min_samples} samples, and there are {num_samples}; "
            "lower num_clients or add samples"
        )


def _groups(
    values: Sequence[str | None] | None, *, column: str, partitioner: str
) -> tuple[tuple[str, ...], IntArray]:
    """Distinct values in alphabetical order, and which of them each sample has."""
    missing = None if values is None else sum(value is None for value in values)
    if values is None or missing:
        count = "every row is" if values is None else f"{missing} of {len(values)} rows are"
        raise ValueError(
            f"{count} without a `{column}`, which the {partitioner} partition needs; "
            "add the field to the data or choose another partition"
        )
    names, group_of = np.unique(np.asarray(values, dtype=str), return_inverse=True)
    return tuple(names.tolist()), group_of.astype(np.int64)


def _draw_clients(shares: NDArray[np.float64], *, count: int, rng: np.random.Generator) -> IntArray:
    """Draw a client for each of `count` samples by inverting the cumulative shares."""
    cumulative = np.cumsum(shares)
    drawn = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
    # A product that rounds up to the last sum would otherwise point past the last client.
    clients: IntArray = np.minimum(drawn, len(shares) - 1).astype(np.int64)
    return clients


def _moves(sizes: IntArray, *, minimum: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """How many samples each client is given and gives away, so that all reach the minimum."""
    given = np.maximum(minimum - sizes, 0)
    surplus = np.maximum(sizes - minimum, 0)
    taken = rng.multivariate_hypergeometric(surplus, int(given.sum()), method="marginals")
    return given, taken


def _top_up(
    client_of: IntArray, *, num_clients: int, minimum: int, rng: np.random.Generator
) -> None:
    """Move random samples, in place, from clients that can spare them to those short of some."""
    sizes = np.bincount(client_of, minlength=num_clients)
    given, taken = _moves(sizes, minimum=minimum, rng=rng)
    # Shuffled within each client, its first `taken` samples are a random choice.
    shuffled = rng.permutation(len(client_of))
    by_client = shuffled[np.argsort(client_of[shuffled], kind="stable")]
    rank = np.arange(len(client_of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    pool = by_client[rank < np.repeat(taken, sizes)]
    client_of[rng.permutation(pool)] = np.repeat(np.arange(num_clients), given)


def _round_to_sum(parts: NDArray[np.float64]) -> IntArray:
    """Round to whole numbers with the same sum: the largest remainders are rounded up."""
    floors = np.floor(parts).astype(np.int64)
    short = round(float(parts.sum())) - int(floors.sum())
    floors[np.argsort(floors - parts, kind="stable")[:short]] += 1
    return floors


def _deal(sizes: IntArray, *, rng: np.random.Generator) -> Partition:
    """Shuffle the samples and give each client its number of them."""
    client_of = np.empty(int(sizes.sum()), dtype=np.int64)
    client_of[rng.permutation(len(client_of))] = np.repeat(np.arange(len(sizes)), sizes)
    return _from_clients(client_of, names=NumberedNames(len(sizes)))


def _from_clients(client_of: IntArray, *, names: Sequence[str]) -> Partition:
    sizes = np.bincount(client_of, minlength=len(names))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    order = np.argsort(client_of, kind="stable").astype(np.int64)
    return Partition(order=order, offsets=offsets, names=names)
