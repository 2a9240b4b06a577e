"""A grid of methods and seeds in the miniature world, as one table.

Each cell of the grid is one `fedsafe fit`, evaluated on the world's held-out questions. Guards that
rows name are trained first. Runs go side by side, one thread each, and are kept: an interrupted
table goes on where it stopped.
"""

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsafe.table_runs import Cell, Fit, GuardRun, Row, TableGuard, run_cell, run_guard
from fedsafe.world.files import write_world

Run = Cell | GuardRun

_WORLD_FILES = ("base", "helpful.jsonl")
"""The last that is written, and what worlds of earlier versions lack."""


class Outcomes(NamedTuple):
    """What became of the runs, each by the name of its folder."""

    results: dict[str, dict[str, Any]]
    errors: dict[str, str]

    def add(self, run: Run, future: Future[dict[str, Any]]) -> str | None:
        """Note what became of a run; returns what went wrong with it."""
        error = _error(future)
        if error is None:
            self.results[run.folder.name] = future.result()
        else:
            self.errors[run.folder.name] = error
        return error

    def found(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Results of the runs that have one, in order."""
        names = [run.folder.name for run in runs]
        return [self.results[name] for name in names if name in self.results]


def run_table(
    rows: Sequence[Row],
    *,
    seeds: Sequence[int],
    output: Path,
    fit: Fit,
    num_workers: int,
    guards: Sequence[TableGuard] = (),
) -> dict[str, Any]:
    """Train every guard, run every row at every seed and write `table.json`.

    Args:
        rows: The methods.
        seeds: Seeds of the data, of training and of evaluation; guards take the first one.
        output: Directory for the table, its runs and their worlds.
        fit: Runs one training; must be picklable.
        num_workers: Runs at a time.
        guards: The guards that rows name, each trained once.

    Returns:
        `rows`: one entry a cell: `method`, `aggregation`, `seed`, `metrics` (percent), `seconds`,
        with a guard `filter`, counts of what it did to the clients' samples, and with
        constitutional training `cai`, its counts and costs;
        `summary`: one entry a row, with mean and spread (standard deviation) over the seeds;
        `guards`: two entries a guard: `name`, `stage` (before or after training), `accuracy`,
        `precision`, `recall`, `f1` and others, shares of 1;
        `failed`: one entry a run that went wrong: `run` (its folder) and `error`.

    Raises:
        ValueError: If there is no row or no seed, two runs have the same name, or a row names a
            guard that is not there or that it has no use for.
    """
    if not rows or not seeds:
        raise ValueError(f"the table has {len(rows)} rows and {len(seeds)} seeds; give one or more")
    _check_guards(rows, guards)
    by_name = {guard.name: _guard_run(guard, rows[0], seeds[0], output) for guard in guards}
    trained = list(by_name.values())
    cells = [_cell(row, seed, output, by_name) for row in rows for seed in seeds]
    runs: list[Run] = [*trained, *cells]
    names = [run.folder.name for run in runs]
    _check_names(names)
    for cell in cells:
        if not all((cell.world / name).exists() for name in _WORLD_FILES):
            write_world(cell.world, harm_share=cell.row.harm_share, seed=cell.seed)
    done = _run_all(trained, cells, fit=fit, num_workers=num_workers)
    results = done.found(cells)
    table = {
        "rows": results,
        "summary": summarise(results),
        "guards": [stage for result in done.found(trained) for stage in result["stages"]],
        "failed": [{"run": n, "error": done.errors[n]} for n in names if n in done.errors],
    }
    scratch = output / "table.json.tmp"
    scratch.write_text(json.dumps(table, indent=1) + "\n")
    scratch.replace(output / "table.json")
    return table


def summarise(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each row, in the order of the rows."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["aggregation"]), []).append(result)
    return [
        {
            "method": method,
            "aggregation": aggregation,
            "num_seeds": len(group),
            "metrics": {
                name: _mean_and_spread([each["metrics"][name] for each in group])
                for name in group[0]["metrics"]
            },
            "seconds": statistics.fmean(each["seconds"] for each in group),
            **_mean_counts(group),
        }
        for (method, aggregation), group in groups.items()
    ]


def _mean_counts(group: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What filter and constitutional training did in one seed's run, on average; if anything."""
    means = {}
    for name in ("filter", "cai"):
        counts = [each[name] for each in group if name in each]
        if counts:
            means[name] = {n: statistics.fmean(each[n] for each in counts) for n in counts[0]}
    return means


def _mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "spread": spread}


def _check_guards(rows: Sequence[Row], guards: Sequence[TableGuard]) -> None:
    known = [guard.name for guard in guards]
    if len(set(known)) < len(known):
        raise ValueError(f"guards are called {', '.join(known)}; give each a name of its own")
    for row in rows:
        if row.guard is not None and row.guard not in known:
            raise ValueError(
                f"row {row.method} names the guard {row.guard!r}, and the table's guards are "
                f"{', '.join(known) or 'none'}; add it to guards"
            )
        if row.guard is not None and not row.configs:
            raise ValueError(
                f"row {row.method} trains nothing, so its guard {row.guard} has nothing to filter; "
                "leave the guard out, or give configs"
            )


def _check_names(names: Sequence[str]) -> None:
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(
            f"several rows share a run: {', '.join(doubled)}; give each row and seed once, and "
            "each row another method or aggregation"
        )


def _guard_run(guard: TableGuard, row: Row, seed: int, output: Path) -> GuardRun:
    """A guard's data and base are those of any world of its seed."""
    return GuardRun(guard, seed, _world(row, seed, output), output / "runs" / f"guard-{guard.name}")


def _cell(row: Row, seed: int, output: Path, guards: Mapping[str, GuardRun]) -> Cell:
    name = f"{row.method}-{row.aggregation}-seed{seed}"
    guard = guards[row.guard] if row.guard is not None else None
    return Cell(row, seed, _world(row, seed, output), output / "runs" / name, guard)


def _world(row: Row, seed: int, output: Path) -> Path:
    return output / "worlds" / f"harm{row.harm_share:g}-seed{seed}"


def _run_all(
    guards: Sequence[GuardRun], cells: Sequence[Cell], *, fit: Fit, num_workers: int
) -> Outcomes:
    """Run all of them, a cell once its guard is there; one that goes wrong stops no other."""
    total = len(guards) + len(cells)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    pool = ProcessPoolExecutor(min(num_workers, total), mp_context=get_context("spawn"))
    outcomes = Outcomes({}, {})
    try:
        with Progress(*columns, TimeElapsedColumn()) as progress:
            task = progress.add_task(f"table, {num_workers} at a time", total=total)
            running: dict[Future[dict[str, Any]], Run] = {}
            running |= {pool.submit(run_guard, guard, fit): guard for guard in guards}
            running |= {pool.submit(run_cell, c, fit): c for c in cells if c.guard is None}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    error = outcomes.add(run, future)
                    for cell in [cell for cell in cells if cell.guard == run]:
                        if error is None:
                            running[pool.submit(run_cell, cell, fit)] = cell
                        else:
                            outcomes.errors[cell.folder.name] = f"{run.folder.name} failed"
                    done = len(outcomes.results) + len(outcomes.errors)
                    progress.update(task, completed=done, description=run.folder.name)
    finally:  # after Ctrl-C the runs that wait are not begun
        pool.shutdown(cancel_futures=True)
    return outcomes


def _error(future: Future[dict[str, Any]]) -> str | None:
    """What went wrong with a run; None if nothing did."""
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, SystemExit):
        return "its configuration is wrong, see log.txt"
    return f"{type(error).__name__}: {error}"
