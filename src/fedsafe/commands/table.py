"""`fedsafe table`: a grid of methods and seeds, each trained and measured."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedsafe.commands import training
from fedsafe.commands.noise import quiet_known_noise
from fedsafe.commands.parsing import call
from fedsafe.data.folder_lock import only_here
from fedsafe.data.output_files import write_whole
from fedsafe.page.write import page_line, write_table_report
from fedsafe.table import run_table
from fedsafe.table_report import as_markdown, as_table, draw_table, grids, lines
from fedsafe.table_settings import TableSettings, chosen
from fedsafe.table_summary import write_csv


def run(name: str, arguments: list[str]) -> None:
    """Parse the arguments and run the table."""
    settings = call(TableSettings, name, arguments)
    table(settings, asked=["fedsafe", name, *arguments])


def table(settings: TableSettings, *, asked: list[str]) -> None:
    """Run every method at every seed; print their table and write its files.

    Raises:
        ValueError: If the table cannot be run, or runs failed; the others are shown before.
    """
    quiet_known_noise()
    num_runs = len(chosen(settings))
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    workers = settings.num_workers or _num_workers(console)
    with only_here(folder, who="fedsafe table", option="--output"):
        found = run_table(
            settings, command=training.run, num_workers=workers, asked=asked, console=console
        )
        for grid in grids(found):
            console.print(as_table(grid))
        for line in lines(found):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        _write(found, folder)
    wrote = "table.json, table.csv, table.md, table.png, runs/"
    console.print(f"wrote {folder}/: {wrote}", soft_wrap=True)
    console.print(page_line(write_table_report, folder), soft_wrap=True)
    if found["failed"]:
        raise ValueError(_failures(found, total=num_runs))


def _write(found: dict[str, Any], folder: Path) -> None:
    """Write the table in the forms that people use; `table.json` is there already."""
    write_csv(found, folder / "table.csv")
    write_whole(folder / "table.md", [as_markdown(found)])
    draw_table(found, folder / "table.png")


def _failures(found: dict[str, Any], *, total: int) -> str:
    names = "\n".join(f"  {run['run']}: {run['error']}" for run in found["failed"])
    return (
        f"{len(found['failed'])} of {total} runs failed:\n{names}\n"
        "Each run's folder holds its log.txt; the same command runs only what is missing."
    )


def _num_workers(console: Console) -> int:
    """One run at a time on a GPU, which several would share; else one a core."""
    if torch.cuda.is_available():
        console.print("one run at a time on the GPU; several with --num_workers, if they fit")
        return 1
    return _num_cores()


def _num_cores() -> int:
    """Cores that this process may use; all of them where the system does not tell, as macOS."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
