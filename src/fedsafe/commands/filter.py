"""`fedsafe filter`: any file of conversations through any guard."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from fedsafe.commands.noise import quiet_known_noise
from fedsafe.commands.parsing import call
from fedsafe.commands.ranks import check_agreed, joined
from fedsafe.data.sources import Rejected
from fedsafe.evaluation.guard_metrics import GuardMetrics
from fedsafe.guard_report import filtered_table
from fedsafe.peers import Peers
from fedsafe.safety.filter import Policy, SafetyFilter
from fedsafe.safety.filter_file import (
    FilteredRow,
    OnBadRow,
    Outputs,
    count_rows,
    filtered,
    usable_rows,
)
from fedsafe.safety.guard import Guard
from fedsafe.safety.guard_model import GuardModel  # noqa: F401  (configurations name it)
from fedsafe.types import JudgedPart


def run(name: str, arguments: list[str]) -> None:
    """Parse the arguments and filter."""
    quiet_known_noise()
    call(filter, name, arguments)


def filter(  # noqa: PLR0913
    input: str,
    output: str,
    guard: Guard,
    *,
    policy: Policy = "drop",
    judge: JudgedPart = "pair",
    threshold: ClosedUnitInterval = 0.5,
    refusals: str | None = None,
    max_unsafe_share: ClosedUnitInterval = 0.7,
    rejected: str | None = None,
    on_bad_row: OnBadRow = "skip",
    overwrite: bool = False,
) -> None:
    """Judge each conversation of a file with a guard; write those that are kept.

    Verdicts are kept in the cache: a command that was stopped goes on, and another threshold costs
    nothing. The files appear together, when all is done. Started by torchrun, each rank has its own
    copy of the guard and judges some of the rows; the files are the same.

    Args:
        input: File of conversations, of type .jsonl, .jsonl.gz, .json, .csv or .parquet; every rank
            reads it.
        output: File NAME.jsonl for the rows that are kept, with all their columns as they were.
            Beside it come NAME.rejected.jsonl (rows that were dropped, with their verdicts),
            NAME.filter.jsonl (a line a judged row: verdict and action, no text), NAME.bad.jsonl
            (rows that could not be used, and why) and NAME.summary.json.
        guard: Guard that judges: its class and settings.
        policy: What becomes of an unsafe row: `drop` leaves it out, `refuse` puts a refusal in
            place of its last answer (and calls it safe, if it is labelled), `keep` only writes the
            verdict down.
        judge: What the guard is shown of a row: the `pair` of prompt and response, the `prompt`
            alone, or the `response` alone.
        threshold: Probability from which a row is unsafe, 0 to 1.
        refusals: Text file of refusals, one a line, for policy `refuse`; the default is those
            shipped.
        max_unsafe_share: Share of unsafe rows in the whole file above which nothing is written: a
            guard that flags nearly everything is set up wrongly. Policy `keep` never stops.
        rejected: JSONL file for the rows that are dropped, in place of NAME.rejected.jsonl.
        on_bad_row: Skip rows that cannot be used, or that the guard cannot judge, and list them in
            NAME.bad.jsonl; or stop with an error, which says of unusable rows before anything is
            judged. A guard that can judge none of the rows, or few of many, always stops.
        overwrite: Whether files of an earlier command may be replaced.
    """
    safety = SafetyFilter(guard, policy, judge, threshold, refusals, max_unsafe_share)
    outputs = Outputs(Path(output), Path(rejected) if rejected is not None else None)
    with joined() as peers:
        peers.from_first(lambda: outputs.files.check(Path(input), overwrite=overwrite))
        total = count_rows(input, on_bad_row=on_bad_row)
        check_agreed(peers, f"numbers of rows in {input}", total)
        summary = _write_all(
            input, safety, outputs, total=total, on_bad_row=on_bad_row, peers=peers
        )
        console = Console()
        console.print(filtered_table(summary))
        console.print(f"wrote {', '.join(map(str, outputs.files.written()))}", soft_wrap=True)


class Tally:
    """Counts of what became of the rows, and how right the guard was where they are labelled."""

    def __init__(self, threshold: float) -> None:
        self.counts: Counter[str] = Counter()
        self._categories: Counter[str] = Counter()
        self._metrics = GuardMetrics(threshold)

    @property
    def judged(self) -> int:
        """Rows that have a verdict."""
        return self.counts["rows"] - self.counts["bad"]

    def add(self, rows: Sequence[FilteredRow | Rejected]) -> None:
        """Count a window of rows."""
        judged = [row for row in rows if isinstance(row, FilteredRow)]
        self.counts.update(rows=len(rows), bad=len(rows) - len(judged))
        self.counts.update(row.action for row in judged)
        self.counts["unsafe"] += sum(row.unsafe for row in judged)
        self.counts["shortened"] += sum(row.verdict.shortened for row in judged)
        for row in judged:
            if row.unsafe:
                self._categories.update(row.verdict.categories)
        labelled = [row for row in judged if row.sample["label"] is not None]
        if labelled:
            self._metrics.update(
                torch.tensor([row.verdict.unsafe for row in labelled], dtype=torch.float64),
                torch.tensor([row.sample["label"] == "unsafe" for row in labelled]),
            )

    def summary(self) -> dict[str, Any]:
        """The figures, `kept` with the refused rows: rows = kept + rejected + bad."""
        counts = self.counts
        kept = counts["kept"] + counts["refused"]
        assert counts["rows"] == kept + counts["dropped"] + counts["bad"], counts
        return {
            "rows": counts["rows"],
            "kept": kept,
            "rejected": counts["dropped"],
            "bad": counts["bad"],
            "unsafe": counts["unsafe"],
            "refused": counts["refused"],
            "shortened": counts["shortened"],
            "categories": dict(sorted(self._categories.items())),
            "labelled": self._metrics.compute()._asdict() if self._metrics.update_count else None,
        }


def _write_all(
    source: str,
    safety: SafetyFilter,
    outputs: Outputs,
    *,
    total: int,
    on_bad_row: OnBadRow,
    peers: Peers,
) -> dict[str, Any]:
    """Write every file, on the first rank; returns the summary."""
    started = time.perf_counter()
    tally = Tally(safety.threshold)
    rows = filtered(usable_rows(source), safety, on_bad_row=on_bad_row, peers=peers)
    writes = peers.index == 0
    with outputs.files.open() if writes else nullcontext():
        for window in _progress(rows, safety, total, shown=writes):
            for row in window if writes else ():
                outputs.write(row)
            tally.add(window)
        safety.check_share(tally.counts["unsafe"], num_judged=tally.judged)
        if tally.counts["rows"] != total:
            raise ValueError(f"{source} changed while it was read; run the command again")
        seconds = time.perf_counter() - started
        summary = {
            "input": source,
            "output": str(outputs.kept),
            "filter": safety.identity,
            **tally.summary(),
            "seconds": round(seconds, 3),
            "rows_per_second": round(total / seconds, 1),
        }
        if writes:
            outputs.write_summary(summary)
    return summary


def _progress(
    windows: Iterator[Sequence[FilteredRow | Rejected]],
    safety: SafetyFilter,
    total: int,
    *,
    shown: bool,
) -> Iterator[Sequence[FilteredRow | Rejected]]:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(f"Filtering with {safety.guard.name}", total=total)
        for window in windows:
            yield window
            progress.advance(task, len(window))
