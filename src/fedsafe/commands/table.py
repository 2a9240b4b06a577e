"""`fedsafe table`: a grid of methods and seeds in the miniature world."""

import os
import sys
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console

from fedsafe.commands import training
from fedsafe.commands.noise import quiet_known_noise
from fedsafe.commands.parsing import CommandParser
from fedsafe.report import cai_table, draw_table, filter_lines, guard_stages_table, results_table
from fedsafe.table import run_table
from fedsafe.table_runs import Row, TableGuard


def run(name: str, arguments: list[str]) -> None:
    """Parse the arguments and run the table."""
    auto_cli(
        table,
        args=arguments,
        prog=f"fedsafe {name}",
        as_positional=False,
        parser_class=CommandParser,
    )


def table(
    output: str,
    rows: list[Row],
    seeds: list[int],
    guards: list[TableGuard] | None = None,
    num_workers: int | None = None,
) -> None:
    """Run every method at every seed; print their table and write `table.json` and `table.png`.

    Runs that are there already, under the same settings, are not run again. A run that fails does
    not stop the others, but for a guard those that need it.

    Args:
        output: Directory for the table, its runs and the miniature's data.
        rows: The methods: name, aggregation, configuration files, harmful share and guard of each.
        seeds: Seeds of the data, of training and of evaluation.
        guards: Guards for the rows to filter with: name and configuration files of each. Each is
            trained once, with the first seed, and measured before and after.
        num_workers: Runs at a time, a thread each; the default is the number of cores.
    """
    quiet_known_noise()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    workers = num_workers or _num_cores()
    console = Console()
    kept = len(list(folder.glob("runs/*/result.json")))
    if kept:
        console.print(f"{kept} runs kept from before; delete {folder}/runs to run them again")
    results = run_table(
        rows, seeds=seeds, output=folder, fit=fit, num_workers=workers, guards=guards or ()
    )
    if results["guards"]:
        console.print(guard_stages_table(results["guards"]))
    if results["summary"]:
        draw_table(results["summary"], folder / "table.png")
        console.print(results_table(results["summary"]))
        for line in filter_lines(results["summary"]):
            console.print(line, soft_wrap=True)
        costs = cai_table(results["summary"])
        if costs is not None:
            console.print(costs)
        wrote = f"wrote {folder}/table.json, {folder}/table.png and {folder}/runs/"
        console.print(wrote, soft_wrap=True)
    if results["failed"]:
        names = "\n".join(f"  {run['run']}: {run['error']}" for run in results["failed"])
        total = len(rows) * len(seeds) + len(guards or ())
        raise ValueError(
            f"{len(results['failed'])} of {total} runs failed:\n{names}\n"
            "Each run's folder holds its log.txt; the same command runs only what is missing."
        )


def _num_cores() -> int:
    """Cores that this process may use; all of them where the system does not tell, as macOS."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fit(arguments: list[str]) -> None:
    """`fedsafe fit`, in a process of the table."""
    training.run("fit", arguments)
