"""Clients in parallel: clients a second on two ranks of one thread, against one process.

    .venv/bin/python benchmarks/parallel_clients.py [--quick]

The same federation under `ClientParallelStrategy` on two ranks, in one process with one thread, and
in one process with two: 8 of 16 clients a round, whose visits are 6 steps x 8 conversations of a
Llama of 7 million parameters. Timed from the end of the first round to the end of the last, so that
starting processes and loading the model are left out. The sides take turns; each figure is the
median of 5.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import workload
from rich.console import Console
from rich.table import Table
from workload import SMALL, TINY

from fedsafe.federated.rounds import FederatedRounds
from fedsafe.strategies.client_parallel import ClientParallelStrategy

BATCH_SIZE = 8


class Size(NamedTuple):
    """How much to train."""

    num_clients: int
    clients_per_round: int
    local_steps: int
    longest: int
    num_rounds: int
    """After one to warm up."""
    repeats: int


FULL = Size(16, 8, local_steps=6, longest=256, num_rounds=2, repeats=5)
QUICK = Size(4, 3, local_steps=2, longest=32, num_rounds=1, repeats=1)


class Side(NamedTuple):
    """A way to run the federation."""

    name: str
    ranks: int
    threads: int
    """Of each rank."""


SIDES = (
    Side("clients_in_parallel", ranks=2, threads=1),
    Side("one_process", ranks=1, threads=1),
    Side("one_process_two_threads", ranks=1, threads=2),
)


# ---- one side, in processes of its own -----------------------------------------------------------


def train(folder: Path, size: Size) -> None:
    """Run the federation in this process, or this rank; the first one prints its seconds."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    shape = shape_of(size)
    num_rows = size.num_clients * size.local_steps * BATCH_SIZE
    lengths = workload.conversation_lengths(num_rows, longest=size.longest)
    rows = workload.random_rows(lengths, vocabulary=shape.vocabulary)
    clock = workload.RoundClock()
    with tempfile.TemporaryDirectory() as run_dir:
        workload.fit(
            workload.lora_lm(folder),
            workload.TokenRows(rows, num_clients=size.num_clients, batch_size=BATCH_SIZE),
            FederatedRounds(size.clients_per_round, local_steps=size.local_steps),
            num_rounds=1 + size.num_rounds,
            run_dir=Path(run_dir),
            callbacks=[clock],
            strategy=ClientParallelStrategy() if ranks > 1 else "auto",
        )
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(clock.cost_after(1).wall_seconds), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def shape_of(size: Size) -> workload.Shape:
    """The model that is trained."""
    return TINY if size is QUICK else SMALL


def seconds_of(side: Side, folder: Path, *, quick: bool) -> float:
    """Seconds of all rounds but the first."""
    launcher = [sys.executable]
    if side.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={side.ranks}"]
    command = [*launcher, __file__, "--train", str(folder), *(["--quick"] if quick else [])]
    finished = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(side.threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(json.loads(finished.stdout.splitlines()[-1]))


# ---- comparison ----------------------------------------------------------------------------------


def run(*, quick: bool) -> dict[str, Any]:
    """Let the sides take turns and print their table."""
    size = QUICK if quick else FULL
    visits = size.num_rounds * size.clients_per_round
    rates: dict[str, list[float]] = {side.name: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        workload.save_base(shape_of(size), Path(folder))
        for _ in range(size.repeats):
            for side in SIDES:
                seconds = seconds_of(side, Path(folder), quick=quick)
                rates[side.name].append(visits / seconds)
                print(f"{side.name}: {visits / seconds:.2f} clients/s", flush=True)
    medians = {name: statistics.median(each) for name, each in rates.items()}
    show(medians)
    ours = medians["clients_in_parallel"]
    return {
        "benchmark": "parallel_clients",
        "quick": quick,
        "vs_one_process": round(ours / medians["one_process"], 3),
        "vs_one_process_two_threads": round(ours / medians["one_process_two_threads"], 3),
        "clients_per_second": {name: round(rate, 3) for name, rate in medians.items()},
        "all_clients_per_second": {n: [round(r, 3) for r in each] for n, each in rates.items()},
        **workload.machine(),
    }


def show(medians: dict[str, float]) -> None:
    """Print the table."""
    table = Table("side", "ranks", "threads of each", "clients/s")
    for side in SIDES:
        rate = f"{medians[side.name]:.2f}"
        table.add_row(side.name.replace("_", " "), str(side.ranks), str(side.threads), rate)
    Console(width=100).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="few rounds, to try the script")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # one side; for the script
    chosen = parser.parse_args(arguments)
    workload.be_quiet()
    if chosen.train is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        train(chosen.train, QUICK if chosen.quick else FULL)
        return
    workload.print_json(run(quick=chosen.quick))


if __name__ == "__main__":
    main()
