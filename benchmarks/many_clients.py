"""A million simulated clients, ten a round: time to plan a round, and memory over 1,000 visits.

    .venv/bin/python benchmarks/many_clients.py [--quick]

`plan_ms`: drawing a round's clients and the samples of each of their batches, median over rounds.
`rss_growth_mb`: growth of the process's memory from the end of the first rounds to the end of the
last, over 1,000 real visits through Lightning's Trainer and `FederatedRounds`.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import workload
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from workload import TINY, Stopwatch

from fedsafe.federated.partition import Partition
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.schedule import Schedule

CLIENTS_PER_ROUND = 10
BATCH_SIZE = 2
LOCAL_STEPS = 2
SAMPLES_PER_CLIENT = 2
SHORTEST, LONGEST = 4, 9
MEGABYTE = 1e6


class Size(NamedTuple):
    """How much to simulate."""

    num_clients: int
    num_rounds: int
    warm_up: int
    planned_rounds: int


FULL = Size(num_clients=1_000_000, num_rounds=100, warm_up=10, planned_rounds=1000)
QUICK = Size(num_clients=10_000, num_rounds=3, warm_up=1, planned_rounds=20)


class MemoryWatch(Callback):
    """Memory of this process at the end of each round; put it after `FederatedRounds`."""

    def __init__(self) -> None:
        self.rss_mb: list[float] = []
        self._process = psutil.Process()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look."""
        self.rss_mb.append(self._process.memory_info().rss / MEGABYTE)


def plan_milliseconds(partition: Partition, *, num_rounds: int) -> list[float]:
    """Time to plan each round, its batches' samples included."""
    schedule = Schedule(
        partition,
        num_rounds=num_rounds,
        clients_per_round=CLIENTS_PER_ROUND,
        batch_size=BATCH_SIZE,
        local_steps=LOCAL_STEPS,
    )
    taken = []
    for round_ in range(num_rounds):
        watch = Stopwatch()
        num_batches = len(list(schedule.plan(round_).batches()))
        taken.append(1e3 * watch.read().wall_seconds)
        assert num_batches == CLIENTS_PER_ROUND * LOCAL_STEPS
    return taken


def train(data: workload.TokenRows, size: Size, folder: Path) -> list[float]:
    """Memory at the end of each round, warm-up included, MB."""
    module = workload.lora_lm(workload.save_base(TINY, folder / "base"))
    memory = MemoryWatch()
    workload.fit(
        module,
        data,
        FederatedRounds(clients_per_round=CLIENTS_PER_ROUND, local_steps=LOCAL_STEPS),
        num_rounds=size.warm_up + size.num_rounds,
        run_dir=folder / "run",
        callbacks=[memory],
    )
    return memory.rss_mb


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark and print its table."""
    size = QUICK if quick else FULL
    watch = Stopwatch()
    lengths = np.random.default_rng(0).integers(
        SHORTEST, LONGEST, size.num_clients * SAMPLES_PER_CLIENT
    )
    rows = workload.random_rows(lengths, vocabulary=TINY.vocabulary)
    rows_seconds = watch.read().wall_seconds
    watch.start()
    workload.deal(len(rows), num_clients=size.num_clients)
    partition_seconds = watch.read().wall_seconds
    data = workload.TokenRows(rows, num_clients=size.num_clients, batch_size=BATCH_SIZE)
    plans = plan_milliseconds(data.partition, num_rounds=size.planned_rounds)
    watch.start()
    with tempfile.TemporaryDirectory() as folder:
        rss_mb = train(data, size, Path(folder))
    measured = {
        "plan_ms": round(statistics.median(plans), 3),
        "plan_ms_worst": round(max(plans), 3),
        "partition_seconds": round(partition_seconds, 3),
        "rows_seconds": round(rows_seconds, 3),
        "train_seconds": round(watch.read().wall_seconds, 1),
        "rss_mb": round(rss_mb[-1], 1),
        "rss_growth_mb": round(rss_mb[-1] - rss_mb[size.warm_up - 1], 2),
    }
    show(size, measured)
    counts = {
        "clients": size.num_clients,
        "samples": len(rows),
        "visits": size.num_rounds * CLIENTS_PER_ROUND,
    }
    return {
        "benchmark": "many_clients",
        "quick": quick,
        **measured,
        **counts,
        **workload.machine(),
    }


def show(size: Size, measured: dict[str, float]) -> None:
    """Print the table."""
    title = f"{size.num_clients:,} clients, {CLIENTS_PER_ROUND} a round, {size.num_rounds} rounds"
    table = Table("measured", "value", title=title)
    for name, value in measured.items():
        table.add_row(name, f"{value:g}")
    Console(width=100).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="few clients, to try the script")
    chosen = parser.parse_args(arguments)
    workload.be_quiet()
    torch.set_num_threads(1)  # tiny tensors; a second thread would only spin
    workload.print_json(run(quick=chosen.quick))


if __name__ == "__main__":
    main()
