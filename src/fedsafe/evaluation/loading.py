"""Benchmarks as loaders of a Trainer: what `fedsafe test` goes through."""

import math
import re
from collections.abc import Sequence

from torch.utils.data import DataLoader, Dataset

from fedsafe.evaluation.benchmark import Benchmark
from fedsafe.peers import ALONE, Peers


class BenchmarkBatch:
    """Some items of a benchmark.

    No dataclass and no tuple: Lightning would copy the benchmark with it when it moves a batch to a
    device.

    Args:
        benchmark: Of which benchmark.
        places: Which items, from 0; none where other replicas have the last batches.
    """

    def __init__(self, benchmark: Benchmark, places: Sequence[int]) -> None:
        self.benchmark = benchmark
        self.places = places


def benchmark_loaders(
    benchmarks: Sequence[Benchmark], replicas: Peers = ALONE
) -> list[DataLoader[BenchmarkBatch]]:
    """All items of each benchmark, in its batches; they are read if that has not been done.

    Args:
        benchmarks: What to ask.
        replicas: Those who share the batches, dealt like cards; all go through as many.

    Raises:
        ValueError: If two benchmarks share a name: each has a file and measures of its own; or one
            cannot be read.
    """
    check_names(benchmarks)
    for benchmark in benchmarks:
        benchmark.load()
    return [
        DataLoader(_Batches(each, replicas), batch_size=None, num_workers=0) for each in benchmarks
    ]


def check_names(benchmarks: Sequence[Benchmark]) -> None:
    """Refuse two benchmarks of the same name, and names that are none of a file.

    Raises:
        ValueError: If there are such.
    """
    names = [benchmark.name for benchmark in benchmarks]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(
                f"a benchmark is called {name!r}; its files will be called so: give it letters, "
                "digits, dots, - and _"
            )
        if names.count(name) > 1:
            raise ValueError(f"two benchmarks are called {name}; give each a name of its own")


class _Batches(Dataset[BenchmarkBatch]):
    """One replica's batches of a benchmark."""

    def __init__(self, benchmark: Benchmark, replicas: Peers) -> None:
        self.benchmark = benchmark
        self.replicas = replicas
        self.batches = batches_of(range(benchmark.num_items), benchmark.batch_size)

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.replicas.size)

    def __getitem__(self, index: int) -> BenchmarkBatch:
        number = index * self.replicas.size + self.replicas.index
        places = self.batches[number] if number < len(self.batches) else []
        return BenchmarkBatch(self.benchmark, places)


def batches_of(places: Sequence[int], size: int) -> list[Sequence[int]]:
    """Items that are asked together."""
    return [places[begin : begin + size] for begin in range(0, len(places), size)]
