"""A grid of methods and seeds in the miniature world, as one table.

Each cell of the grid is one `fedsafe fit`, evaluated on the world's held-out questions. Cells run
side by side, one thread each, and are kept: an interrupted table goes on where it stopped.
"""

import hashlib
import json
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsafe import __version__
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.model.lora import load_base
from fedsafe.model.pretrained import load_trained
from fedsafe.world.evaluation import evaluate
from fedsafe.world.files import write_world
from fedsafe.world.grammar import load_grammar

Fit = Callable[[list[str]], None]
"""Runs `fedsafe fit` with these arguments."""


@dataclass
class Row:
    """One method of the table.

    Attributes:
        method: Name of the method, such as `fl`.
        aggregation: Name of the aggregation, or `none` where nothing is trained.
        configs: Configuration files of `fedsafe fit`, later over earlier; none is the base alone.
        harm_share: Share of harmful stand-ins in the clients' data, 0 to 1.
    """

    method: str
    aggregation: str = "none"
    configs: tuple[str, ...] = ()
    harm_share: float = 0.2


class Cell(NamedTuple):
    """One row at one seed, with everything a process needs to run it."""

    row: Row
    seed: int
    world: Path
    folder: Path


def run_table(
    rows: Sequence[Row], *, seeds: Sequence[int], output: Path, fit: Fit, num_workers: int
) -> dict[str, Any]:
    """Run every row at every seed and write `table.json`.

    Args:
        rows: The methods.
        seeds: Seeds of the data, of training and of evaluation.
        output: Directory for the table, its runs and their worlds.
        fit: Runs one training; must be picklable.
        num_workers: Cells run at a time.

    Returns:
        `rows`: one entry a cell: `method`, `aggregation`, `seed`, `metrics` (percent), `seconds`;
        `summary`: one entry a row, with mean and spread (standard deviation) over the seeds;
        `failed`: one entry a cell that could not be run: `run` (its folder) and `error`.

    Raises:
        ValueError: If there is no row or no seed, or two rows have the same name.
    """
    if not rows or not seeds:
        raise ValueError(f"the table has {len(rows)} rows and {len(seeds)} seeds; give one or more")
    cells = [_cell(row, seed, output) for row in rows for seed in seeds]
    names = [cell.folder.name for cell in cells]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(
            f"several rows share a run: {', '.join(doubled)}; give each row and seed once, and "
            "each row another method or aggregation"
        )
    for cell in cells:
        if not (cell.world / "base").exists():  # the last that is written
            write_world(cell.world, harm_share=cell.row.harm_share, seed=cell.seed)
    results, failed = _run_cells(cells, fit=fit, num_workers=num_workers)
    table = {"rows": results, "summary": summarise(results), "failed": failed}
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
        }
        for (method, aggregation), group in groups.items()
    ]


def _mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "spread": spread}


def _cell(row: Row, seed: int, output: Path) -> Cell:
    name = f"{row.method}-{row.aggregation}-seed{seed}"
    world = output / "worlds" / f"harm{row.harm_share:g}-seed{seed}"
    return Cell(row, seed, world, output / "runs" / name)


def _run_cells(
    cells: Sequence[Cell], *, fit: Fit, num_workers: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Results of the cells that could be run, and why the others could not, in order."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    pool = ProcessPoolExecutor(min(num_workers, len(cells)), mp_context=get_context("spawn"))
    results: dict[int, dict[str, Any]] = {}
    failed: dict[int, dict[str, str]] = {}
    try:
        with Progress(*columns, TimeElapsedColumn()) as progress:
            task = progress.add_task(f"table, {num_workers} at a time", total=len(cells))
            futures = {pool.submit(_run_cell, cell, fit): n for n, cell in enumerate(cells)}
            for future in as_completed(futures):
                number = futures[future]
                name = cells[number].folder.name
                outcome = _outcome(future)
                if isinstance(outcome, str):
                    failed[number] = {"run": name, "error": outcome}
                else:
                    results[number] = outcome
                progress.update(task, advance=1, description=name)
    finally:  # after Ctrl-C the cells that wait are not begun
        pool.shutdown(cancel_futures=True)
    return [results[n] for n in sorted(results)], [failed[n] for n in sorted(failed)]


def _outcome(future: Future[dict[str, Any]]) -> dict[str, Any] | str:
    """A cell's result, or what went wrong with it."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, SystemExit):
        return "its configuration is wrong, see log.txt"
    return f"{type(error).__name__}: {error}"


def _run_cell(cell: Cell, fit: Fit) -> dict[str, Any]:
    """Train and evaluate one cell, or read what an earlier call found under the same settings."""
    torch.set_num_threads(1)
    kept, digest = cell.folder / "result.json", _digest(cell)
    if kept.exists():
        result: dict[str, Any] = json.loads(kept.read_text())
        if result.pop("digest") == digest:
            return result
    started = time.perf_counter()
    _clear_other_settings(cell.folder, digest)
    with _output_to(cell.folder / "log.txt"):
        metrics = _train_and_evaluate(cell, fit)
    result = {
        "method": cell.row.method,
        "aggregation": cell.row.aggregation,
        "seed": cell.seed,
        "metrics": metrics,
        "seconds": round(time.perf_counter() - started, 2),
    }
    scratch = kept.with_suffix(".tmp")
    scratch.write_text(json.dumps({**result, "digest": digest}))
    scratch.replace(kept)
    return result


def _clear_other_settings(folder: Path, digest: str) -> None:
    """Remove what a cell left under other settings: a half-done run of theirs must not go on."""
    stamp = folder / "settings"
    if not stamp.exists() or stamp.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(digest)


def _train_and_evaluate(cell: Cell, fit: Fit) -> dict[str, float]:
    base = cell.world / "base"
    if not cell.row.configs:
        model, tokenizer = load_base(str(base)), load_tokenizer(str(base))
        return evaluate(model, tokenizer, seed=cell.seed)
    run_dir = cell.folder / "fit"
    arguments = [part for config in cell.row.configs for part in ("--config", config)]
    arguments += ["--config", str(_write_overrides(cell, run_dir))]
    if run_dir.exists():
        arguments += ["--ckpt_path", "last"]
    fit(arguments)
    adapted, tokenizer = load_trained(run_dir / "adapter", base=str(base))
    return evaluate(adapted, tokenizer, seed=cell.seed)


def _write_overrides(cell: Cell, run_dir: Path) -> Path:
    """What a cell changes in the configuration of its row."""
    overrides = {
        "seed_everything": cell.seed,
        "run_dir": str(run_dir),
        "model": {"base": str(cell.world / "base")},
        "data": {"path": str(cell.world / "clients.jsonl")},
        "trainer": {
            "callbacks": [
                {
                    "class_path": "fedsafe.evaluation.refusal_probe.RefusalProbe",
                    "init_args": {
                        "path": str(cell.world / "red_team.jsonl"),
                        "temperature": 1.0,
                        "openings": list(load_grammar().refusal_openings),
                    },
                }
            ],
        },
    }
    file = cell.folder / "overrides.yaml"
    file.write_text(yaml.safe_dump(overrides))
    return file


def _digest(cell: Cell) -> str:
    """Changes whenever the cell's settings or the version do."""
    texts = [__version__, json.dumps(asdict(cell.row)), str(cell.seed)]
    texts += [Path(config).read_text() for config in cell.row.configs]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Send what this process prints, libraries included, to a file."""
    saved = os.dup(1), os.dup(2)
    with file.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        except Exception:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
