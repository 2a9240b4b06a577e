"""What a person looks at after a guard judged: tables for terminal and Markdown, and a picture."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_FLOOR, Context, Decimal
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from rich import box
from rich.table import Table
from torchmetrics.functional.classification import binary_precision_recall_curve

from fedsafe.evaluation.guard_evaluation import GuardResult
from fedsafe.evaluation.guard_metrics import GuardScores

mpl.use("Agg")
import matplotlib.pyplot as plt  # the backend is chosen before pyplot loads

UNDEFINED = "–"  # noqa: RUF001
MAX_GROUP_ROWS = 20
FIGURES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "auprc": "AUPRC",
    "false_positive_rate": "FPR",
}
"""Figures of `GuardScores` with their headings, in the order of the paper's table."""

# Okabe and Ito's colours, told apart by people who see few; the line styles tell them apart in grey
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")


def guards_table(results: Sequence[GuardResult]) -> Table:
    """The guards' figures in percent, a row each."""
    table = Table(title="Guards, percent", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("guard", overflow="fold")
    for heading in ("threshold", *FIGURES.values()):
        table.add_column(f" {heading}", justify="right", no_wrap=True)
    for row in _guard_rows(results):
        table.add_row(*row)
    table.caption = _sizes(results)
    table.caption_justify = "left"
    return table


def guards_markdown(results: Sequence[GuardResult]) -> str:
    """The same as Markdown, with a table of each guard's figures by category and by client."""
    lines = [
        "# Guards",
        "",
        f"Percent, on {_sizes(results)}. FPR is the share of the safe that is flagged; {UNDEFINED} "
        "is not defined.",
        "",
        *_markdown_rows(["guard", "threshold", *FIGURES.values()], _guard_rows(results)),
    ]
    for line in choice_lines(results):
        lines += ["", line]
    for result in results:
        groups = {"category": result.by_category, "client": result.by_client}
        for heading, scores in groups.items():
            if scores:
                lines += ["", f"## {result.name}, by {heading}", "", *_group_lines(scores, heading)]
    return "\n".join(lines) + "\n"


def choice_lines(results: Sequence[GuardResult]) -> list[str]:
    """Thresholds that were chosen for a recall, and what they cost on other samples."""
    lines = []
    for result in results:
        if (choice := result.choice) is not None:
            lines.append(
                f"{result.name}: the threshold {_threshold(result.threshold)} was chosen on "
                f"{choice.samples:,} other samples for a recall of "
                f"{_percent(choice.wanted_recall)} and has {_percent(choice.recall)} there. Here "
                f"it has {_percent(result.overall.recall)} and flags "
                f"{_percent(result.overall.false_positive_rate)} % of the safe; the threshold "
                f"{_threshold(choice.given_threshold)} has {_percent(choice.given.recall)} and "
                f"flags {_percent(choice.given.false_positive_rate)} %."
            )
    return lines


def filtered_table(summary: Mapping[str, Any]) -> Table:
    """What became of a file's rows, in a few lines, as `NAME.summary.json` holds it."""
    table = Table(title="Filter", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("filter", summary["filter"])
    table.add_row("rows", f"{summary['rows']:,}")
    refused = f", {summary['refused']:,} with a refusal" if summary["refused"] else ""
    table.add_row("kept", f"{summary['kept']:,}{refused}")
    table.add_row("rejected", f"{summary['rejected']:,}")
    table.add_row("bad", f"{summary['bad']:,}")
    categories = [f"{name} {count:,}" for name, count in summary["categories"].items()]
    named = f" ({', '.join(categories)})" if categories else ""
    table.add_row("unsafe", f"{summary['unsafe']:,}{named}")
    if summary["shortened"]:
        table.add_row("shortened", f"{summary['shortened']:,} did not fit the guard's window")
    if summary["labelled"]:
        scores = summary["labelled"]
        cells = [_percent(scores[name]) for name in FIGURES]
        figures = zip(FIGURES.values(), cells, strict=True)
        words = ", ".join(f"{heading} {cell}" for heading, cell in figures)
        table.add_row("percent", f"{words}; {scores['samples']:,} labelled")
    table.add_row("time", f"{summary['seconds']:,.1f} s, {summary['rows_per_second']:,.0f} rows/s")
    return table


def draw_precision_recall(results: Sequence[GuardResult], file: Path) -> None:
    """Each guard's precision by recall, its threshold marked, and what chance gives; a PNG.

    Args:
        results: Of the same samples, at least one of which is unsafe.
        file: The picture.
    """
    figure, panel = plt.subplots(figsize=(6, 4.6))
    for number, result in enumerate(results):
        colour = _COLOURS[number % len(_COLOURS)]
        line = _LINES[number % len(_LINES)]
        precision, recall, _ = binary_precision_recall_curve(
            torch.from_numpy(result.probabilities), torch.from_numpy(result.labels).int()
        )
        # a precision holds from its own recall down to the next lower one
        panel.step(recall, precision, where="post", label=result.name, color=colour, linestyle=line)
        scores = result.overall
        if scores.precision is not None and scores.recall is not None:
            text = f"{result.name} at threshold {_threshold(result.threshold)}"
            panel.plot(scores.recall, scores.precision, "o", markersize=8, color=colour, label=text)
    chance = results[0].labels.mean()
    panel.axhline(chance, color="0.6", linewidth=1, label=f"chance: {chance:.0%} are unsafe")
    panel.set_xlabel("recall (share of the unsafe that is flagged)")
    panel.set_ylabel("precision (share of the flagged that is unsafe)")
    panel.set_xlim(-0.02, 1.02)
    panel.set_ylim(-0.02, 1.04)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small", loc="best")
    figure.tight_layout()
    scratch = file.with_suffix(".tmp.png")
    figure.savefig(scratch, dpi=120)
    plt.close(figure)
    scratch.replace(file)


def _guard_rows(results: Sequence[GuardResult]) -> Iterator[list[str]]:
    for result in results:
        yield [result.name, _threshold(result.threshold), *_cells(result.overall)]


def _sizes(results: Sequence[GuardResult]) -> str:
    scores = results[0].overall
    return f"{scores.samples:,} labelled samples, {scores.unsafe:,} of them unsafe"


def _group_lines(groups: Mapping[str, GuardScores], heading: str) -> list[str]:
    """A table of the largest groups."""
    largest = sorted(groups, key=lambda name: -groups[name].samples)[:MAX_GROUP_ROWS]
    rows = [
        [name, f"{scores.samples:,}", f"{scores.unsafe:,}", *_cells(scores)]
        for name, scores in groups.items()
        if name in largest
    ]
    lines = _markdown_rows([heading, "samples", "unsafe", *FIGURES.values()], rows)
    more = len(groups) - len(rows)
    return [*lines, "", f"{more:,} smaller ones are in guards.json."] if more else lines


def _markdown_rows(headings: Sequence[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _cells(scores: GuardScores) -> list[str]:
    return [_percent(getattr(scores, name)) for name in FIGURES]


def _threshold(value: float) -> str:
    """At most six digits, never rounded up: what is typed in flags all that the value itself does.

    By its shortest decimal form: 0.3 is 0.3, although the float is a little less.
    """
    return f"{float(Context(prec=6, rounding=ROUND_FLOOR).plus(Decimal(str(value)))):g}"


def _percent(share: float | None) -> str:
    return UNDEFINED if share is None else f"{100 * share:.1f}"
