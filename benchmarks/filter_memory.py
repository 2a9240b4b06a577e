"""`fedsafe filter` on 100,000 rows: does memory grow with the file, and what does fedsafe cost?

    .venv/bin/python benchmarks/filter_memory.py [--quick]

The guard is a stub that costs nothing, so what is measured is all but the guard: reading, checking,
the cache of verdicts, writing. `rss_growth_mb` is the highest memory of the process during the
command less that just before it, once everything is imported.
"""

import argparse
import hashlib
import json
import os
import random
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import workload
from rich.console import Console
from rich.table import Table
from workload import Stopwatch

from fedsafe.commands.filter import filter as filter_file
from fedsafe.safety.guard import Guard
from fedsafe.types import Conversation, Verdict

NUM_ROWS, NUM_ROWS_QUICK = 100_000, 3_000
BAD_EVERY = 1_000
MEGABYTE = 1e6
WATCH_SECONDS = 0.01


class StubGuard(Guard):
    """Verdicts from a hash of the last turn; one in ten is unsafe."""

    name = "stub"
    identity = "stub"

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Hash."""
        return [self._verdict(each[-1]["content"]) for each in conversations]

    def _verdict(self, text: str) -> Verdict:
        unsafe = hashlib.blake2b(text.encode(), digest_size=1).digest()[0] / 255
        return Verdict(unsafe, ("S1",) if unsafe >= 0.9 else (), self.name)


class MemoryWatch(threading.Thread):
    """The highest memory of this process, looked at a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._done = threading.Event()
        self.before = self.highest = self._process.memory_info().rss

    def run(self) -> None:
        """Look."""
        while not self._done.wait(WATCH_SECONDS):
            self.highest = max(self.highest, self._process.memory_info().rss)

    def growth_mb(self) -> float:
        """Growth until now; ends the watch."""
        self._done.set()
        self.join()
        return (self.highest - self.before) / MEGABYTE


def write_rows(file: Path, *, num_rows: int) -> Path:
    """Conversations of about 160 words, no two the same; a bad row now and then."""
    rng = random.Random(0)
    words = [f"word{n}" for n in range(1000)]
    with file.open("w", encoding="utf-8") as out:
        for number in range(num_rows):
            question, answer = (" ".join(rng.choices(words, k=n)) for n in (40, 120))
            row = {"prompt": f"{number} {question}", "response": answer, "id": number}
            if number % BAD_EVERY == BAD_EVERY - 1:
                del row["response"]
            out.write(json.dumps(row) + "\n")
    return file


def filter_once(source: Path) -> dict[str, Any]:
    """Run the command's function; returns its summary."""
    kept = source.with_name(f"{source.stem}-kept.jsonl")
    filter_file(str(source), str(kept), StubGuard(), threshold=0.9)
    summary: dict[str, Any] = json.loads(kept.with_suffix(".summary.json").read_text())
    return summary


def run(*, quick: bool) -> dict[str, Any]:
    """Run the benchmark and print its table."""
    num_rows = NUM_ROWS_QUICK if quick else NUM_ROWS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FEDSAFE_CACHE"] = str(folder / "cache")
        source = write_rows(folder / "rows.jsonl", num_rows=num_rows)
        memory, watch = MemoryWatch(), Stopwatch()
        memory.start()
        summary = filter_once(source)
        growth, seconds = memory.growth_mb(), watch.read().wall_seconds
        measured = {
            "rss_growth_mb": round(growth, 1),
            "rss_before_mb": round(memory.before / MEGABYTE, 1),
            "file_mb": round(source.stat().st_size / MEGABYTE, 1),
            "rows_per_second": round(num_rows / seconds, 1),
            "seconds": round(seconds, 2),
        }
    counts = {name: summary[name] for name in ("rows", "kept", "rejected", "bad")}
    counts["unaccounted"] = num_rows - counts["kept"] - counts["rejected"] - counts["bad"]
    show(measured | counts)
    machine = workload.machine()
    return {"benchmark": "filter_memory", "quick": quick, **measured, **counts, **machine}


def show(measured: dict[str, float]) -> None:
    """Print the table."""
    table = Table("measured", "value", title="fedsafe filter")
    for name, value in measured.items():
        table.add_row(name, f"{value:,g}")
    Console(width=100).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="few rows, to try the script")
    chosen = parser.parse_args(arguments)
    workload.be_quiet()
    workload.print_json(run(quick=chosen.quick))


if __name__ == "__main__":
    main()
