"""What federation costs: a visit through Lightning and `FederatedRounds`, against a bare loop.

    .venv/bin/python benchmarks/round_overhead.py [--quick]

`overhead_ms_per_visit`: CPU time of a visit of 10 steps of a tiny model, minus that of a loop of
forward, backward and AdamW over the same packed batches, built in advance. Two clients a round; the
costs of a round's end (aggregation, files) are shared by its visits. The first rounds, and whatever
a fit does once, are left out.

`overhead_share`: for visits of 10 steps x 8 samples x 256 tokens of a Llama of 7 million
parameters, the share of CPU time outside forward, backward and optimizer, timed in place: the
difference of two long runs would be lost in the noise.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import workload
from lightning import Callback
from profiling import COMPUTE, Breakdown, Window, break_down
from rich.console import Console
from rich.table import Table
from torch.optim import AdamW
from workload import SMALL, TINY, Cost, Shape, Stopwatch

from fedsafe.data.packing import TrainingBatch, pack_batch
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.schedule import Schedule
from fedsafe.model.module import LoraLM

CLIENTS_PER_ROUND = 2
NUM_CLIENTS = 4
LOCAL_STEPS = 10


class Task(NamedTuple):
    """A model and what its clients train on."""

    module: LoraLM
    data: workload.TokenRows
    visits: list[list[TrainingBatch]]
    """The packed batches of one round's visits, built in advance."""


def make_task(shape: Shape, base: Path, *, batch_size: int, length: int) -> Task:
    """A task whose samples all have one length, with enough of them for each step of a visit."""
    num_samples = NUM_CLIENTS * LOCAL_STEPS * batch_size
    lengths = np.full(num_samples, length, dtype=np.int64)
    rows = workload.random_rows(lengths, vocabulary=shape.vocabulary)
    data = workload.TokenRows(rows, num_clients=NUM_CLIENTS, batch_size=batch_size)
    schedule = Schedule(
        data.partition,
        num_rounds=1,
        clients_per_round=CLIENTS_PER_ROUND,
        batch_size=batch_size,
        local_steps=LOCAL_STEPS,
    )
    visits = [
        [pack_batch(data.store, key) for key in schedule.batches_of(visit)]
        for visit in schedule.plan(0).visits
    ]
    return Task(workload.lora_lm(workload.save_base(shape, base)), data, visits)


# ---- the two sides ------------------------------------------------------------------------------


def federated(
    task: Task, *, num_rounds: int, warm_up: int, callbacks: Sequence[Callback] = ()
) -> Cost:
    """Cost of one visit inside a fit, after `warm_up` rounds."""
    clock = workload.RoundClock()
    rounds = FederatedRounds(clients_per_round=CLIENTS_PER_ROUND, local_steps=LOCAL_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        workload.fit(
            task.module,
            task.data,
            rounds,
            num_rounds=warm_up + num_rounds,
            run_dir=Path(folder),
            callbacks=[clock, *callbacks],
        )
    return clock.cost_after(warm_up) / (num_rounds * CLIENTS_PER_ROUND)


def bare(task: Task, *, num_rounds: int, warm_up: int) -> Cost:
    """Cost of one visit of a bare PyTorch loop: a fresh AdamW, and its steps over ready batches."""
    parameters = task.module.flat_adapter().parameters
    watch = Stopwatch()
    for round_ in range(warm_up + num_rounds):
        if round_ == warm_up:
            watch.start()
        for batches in task.visits:
            _bare_visit(task.module, parameters, batches)
    return watch.read() / (num_rounds * CLIENTS_PER_ROUND)


def _bare_visit(module: LoraLM, parameters: Any, batches: Sequence[TrainingBatch]) -> None:
    optimizer = AdamW(parameters, lr=workload.LEARNING_RATE, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        (module(batch).sum() / batch.normalizer).backward()
        optimizer.step()


class Sides(NamedTuple):
    """Medians over the repeats, per visit."""

    federated: Cost
    bare: Cost
    overhead: Cost
    """Median of the differences of neighbouring runs."""


def compare(task: Task, *, repeats: int, num_rounds: int, warm_up: int) -> Sides:
    """Let the two sides take turns."""
    costs = [
        (
            federated(task, num_rounds=num_rounds, warm_up=warm_up),
            bare(task, num_rounds=num_rounds, warm_up=warm_up),
        )
        for _ in range(repeats)
    ]
    ours, loop = zip(*costs, strict=True)
    return Sides(
        workload.median(ours), workload.median(loop), workload.median([a - b for a, b in costs])
    )


def profiled(task: Task, *, num_rounds: int, warm_up: int) -> Breakdown:
    """Where the CPU time of a fit goes."""
    with break_down() as breakdown:
        window = Window(breakdown, warm_up=warm_up)
        federated(task, num_rounds=num_rounds, warm_up=warm_up, callbacks=[window])
    return breakdown


# ---- output -------------------------------------------------------------------------------------


def show_sides(sides: Sides) -> None:
    """Print what both sides cost."""
    table = Table("per visit, 10 steps of a tiny model", "CPU ms", "wall ms")
    for name, cost in sides._asdict().items():
        table.add_row(name, f"{1e3 * cost.cpu_seconds:.2f}", f"{1e3 * cost.wall_seconds:.2f}")
    Console(width=100).print(table)


def show_parts(title: str, breakdown: Breakdown, *, num_visits: int) -> None:
    """Print where the time goes."""
    table = Table(f"per visit, {title}", "CPU ms", "calls")
    for name, part in breakdown.sorted_parts():
        milliseconds = 1e3 * part.cpu_seconds / num_visits
        table.add_row(name, f"{milliseconds:.2f}", f"{part.calls / num_visits:.1f}")
    Console(width=100).print(table)


class Plan(NamedTuple):
    """How long to measure."""

    repeats: int
    num_rounds: int
    warm_up: int


def per_visit(folder: Path, plan: Plan) -> dict[str, Any]:
    """The overhead of a visit, on a model so small that it can be seen."""
    task = make_task(TINY, folder, batch_size=4, length=16)
    sides = compare(task, **plan._asdict())
    breakdown = profiled(task, num_rounds=plan.num_rounds, warm_up=plan.warm_up)
    num_visits = plan.num_rounds * CLIENTS_PER_ROUND
    show_sides(sides)
    show_parts("10 steps x 4 x 16 tokens", breakdown, num_visits=num_visits)
    return {
        "overhead_ms_per_visit": round(1e3 * sides.overhead.cpu_seconds, 3),
        "bare_ms_per_visit": round(1e3 * sides.bare.cpu_seconds, 3),
        "breakdown_ms": {
            name: round(1e3 * part.cpu_seconds / num_visits, 3)
            for name, part in breakdown.sorted_parts()
        },
    }


def share(folder: Path, *, shape: Shape, length: int, num_rounds: int) -> dict[str, Any]:
    """The overhead as a share of a realistic visit, after a round to warm up."""
    task = make_task(shape, folder, batch_size=8, length=length)
    breakdown = profiled(task, num_rounds=num_rounds, warm_up=1)
    num_visits = num_rounds * CLIENTS_PER_ROUND
    show_parts(f"10 steps x 8 x {length} tokens", breakdown, num_visits=num_visits)
    total = breakdown.total_cpu_seconds
    outside = total - breakdown.parts[COMPUTE].cpu_seconds
    return {
        "overhead_share": round(outside / total, 5),
        "overhead_share_ms_per_visit": round(1e3 * outside / num_visits, 3),
        "overhead_share_visit_cpu_seconds": round(total / num_visits, 3),
    }


def run(*, quick: bool, threads: int) -> dict[str, Any]:
    """Run both parts and print their tables."""
    plan = Plan(1, 3, 1) if quick else Plan(5, 30, 3)
    shape, length, num_rounds = (TINY, 32, 1) if quick else (SMALL, 256, 2)
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)  # tiny tensors; a second thread would only spin
        tiny = per_visit(Path(folder) / "tiny", plan)
        torch.set_num_threads(threads)
        real = share(Path(folder) / "small", shape=shape, length=length, num_rounds=num_rounds)
    return {"benchmark": "round_overhead", "quick": quick, **tiny, **real, **workload.machine()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="few rounds, to try the script")
    parser.add_argument("--threads", type=int, default=2, help="for the model of 7M parameters")
    chosen = parser.parse_args(arguments)
    workload.be_quiet()
    workload.print_json(run(quick=chosen.quick, threads=chosen.threads))


if __name__ == "__main__":
    main()
