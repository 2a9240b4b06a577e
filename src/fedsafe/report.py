"""What a person looks at: tables in the terminal, a picture in the run directory."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.data.filtered import FilterReport, FilterRow
from fedsafe.federated.csv_logger import RoundCSVLogger
from fedsafe.federated.partition import PartitionRow
from fedsafe.federated.round_log import cai_costs
from fedsafe.page.records import read_run
from fedsafe.page.write import page_line, write_run_report

mpl.use("Agg")
import matplotlib.pyplot as plt  # the backend is chosen before pyplot loads

MAX_CLIENT_ROWS = 20
_STATUSES = ("ok", "failed", "late", "refused")
DEEDS = ("dropped", "refused")
"""What a filter may do to a sample; counts of it have these names."""


class RunReport(Callback):
    """Prints partition and summary of a run, draws `rounds.png` and writes `report.html`."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print who holds what."""
        if trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            assert isinstance(data, FederatedDataModule)
            if rows := data.client_rows():  # none where clients are on other machines
                Console().print(partition_table(rows, num_validation=data.num_validation_samples))
            if data.filter_report is not None:
                Console().print(filter_table(data.filter_report))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what a resumed run is about to measure again."""
        for logger in _csv_loggers(trainer):
            logger.experiment.keep_rounds(trainer.current_epoch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete `metrics.csv`, draw the picture, print the summary and write the page."""
        if not trainer.is_global_zero:
            return
        run_dir = Path(trainer.default_root_dir)
        run = read_run(run_dir)
        rows = run.rounds
        if not rows:
            return
        for logger in _csv_loggers(trainer):
            logger.experiment.complete(rows)
            logger.save()
        draw_rounds(rows, run_dir / "rounds.png", before=run.before)
        data = trainer.datamodule  # type: ignore[attr-defined]
        Console().print(summary_table(rows, run_dir, filtered=data.filter_report))
        Console().print(page_line(write_run_report, run_dir), soft_wrap=True)


def partition_table(rows: Sequence[PartitionRow], *, num_validation: int) -> Table:
    """Clients with their samples, tokens and harmful share; the largest of many."""
    shown = sorted(rows, key=lambda row: -row.samples)[:MAX_CLIENT_ROWS]
    shown_names = {row.client for row in shown}
    table = Table(title="Partition", title_justify="left")
    for name in ("client", "samples", "tokens", "harmful"):
        table.add_column(name, justify="left" if name == "client" else "right")
    for row in rows:
        if row.client in shown_names:
            table.add_row(row.client, f"{row.samples:,}", f"{row.tokens:,}", _share(row))
    if len(rows) > len(shown):
        table.add_row(f"… and {len(rows) - len(shown):,} smaller", "", "", "")
    table.add_section()
    samples, tokens = sum(row.samples for row in rows), sum(row.tokens for row in rows)
    table.add_row(f"all {len(rows):,}", f"{samples:,}", f"{tokens:,}", _overall_share(rows))
    table.caption = f"{num_validation:,} samples held out for validation"
    return table


def filter_table(report: FilterReport) -> Table:
    """What the safety filter did to each client's samples; the largest of many clients."""
    shown = sorted(report.clients, key=lambda row: -row.judged)[:MAX_CLIENT_ROWS]
    shown_names = {row.client for row in shown}
    total = report.total
    everything = [total, report.held_out]
    deeds = [name for name in DEEDS if any(getattr(row, name) for row in everything)]
    counts = ["judged", "unsafe", *deeds, "left"]
    table = Table(title=f"Safety filter: {report.guard}", title_justify="left")
    for name in ("client", *counts, "precision", "recall"):
        table.add_column(name, justify="left" if name == "client" else "right")
    for row in report.clients:
        if row.client in shown_names:
            table.add_row(*_filter_cells(row, counts))
    if len(report.clients) > len(shown):
        table.add_row(f"… and {len(report.clients) - len(shown):,} more")
    table.add_section()
    for row in everything:
        if row.judged:
            table.add_row(*_filter_cells(row, counts))
    table.caption = "; ".join(_filter_notes(report))
    return table


def _filter_notes(report: FilterReport) -> Iterator[str]:
    yield f"policy {report.policy}, unsafe from {report.threshold:g}"
    if report.num_shortened:
        yield f"{report.num_shortened:,} judged by their beginning and end alone"
    if report.num_unjudged:
        yield f"{report.num_unjudged:,} left out, the guard could not judge them"
    if report.held_out.judged and report.policy != "keep":
        yield (
            "what is held out is filtered too: val/loss with and without a filter is not of the "
            "same samples"
        )


def _filter_cells(row: FilterRow, counts: Sequence[str]) -> list[str]:
    return [
        row.client,
        *(f"{getattr(row, name):,}" for name in counts),
        *("-" if rate is None else f"{rate:.0%}" for rate in (row.precision, row.recall)),
    ]


def _filter_line(report: FilterReport) -> str:
    """The safety filter in one line."""
    total = report.total
    done = [f"{count:,} {deed}" for deed in DEEDS if (count := getattr(total, deed))]
    counts = f"{total.unsafe:,} of {total.judged:,} samples unsafe"
    empty = sum(row.left == 0 for row in report.clients)
    lost = f"; {empty:,} clients left without a sample" if empty else ""
    return f"{report.guard}: {counts}, {', '.join(done) or 'all kept'}{lost}"


def summary_table(
    rows: Sequence[dict[str, Any]], run_dir: Path, *, filtered: FilterReport | None = None
) -> Table:
    """The run in a few lines: losses, safety, failures, cost, and where things are."""
    first, last = rows[0], rows[-1]
    visits = [client for row in rows for client in row["clients"]]
    table = Table(title="Summary", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("rounds", str(last["round"]))
    table.add_row("visits", _visit_counts(visits))
    if filtered is not None:
        table.add_row("filter", _filter_line(filtered))
    measured = {"loss": "train/loss", **{n: n for n in last if n.startswith("val/")}}
    for name, label in measured.items():
        table.add_row(label, f"{_number(first.get(name))} → {_number(last.get(name))}")
    if any("cai" in row for row in rows):
        table.add_row("constitution", _cai_line(cai_costs(rows), num_rounds=len(rows)))
    seconds = sum(row["seconds"] for row in rows)
    table.add_row("training", f"{seconds:,.1f} s, {sum(r['tokens'] for r in rows):,} answer tokens")
    up, down = (sum(row[name] for row in rows) / 1e6 for name in ("bytes_up", "bytes_down"))
    table.add_row("on the wire", f"{up:,.1f} MB up, {down:,.1f} MB down")
    table.add_row("files", str(run_dir))
    return table


def _cai_line(costs: dict[str, float], *, num_rounds: int) -> str:
    """Constitutional training in one line."""
    tokens = sum(costs[f"tokens_{name}"] for name in ("generated", "read", "trained"))
    return (
        f"trained after {costs['visits']:,} of {num_rounds} rounds on {costs['pairs']:,} pairs: "
        f"{costs['sft_steps']:,} + {costs['dpo_steps']:,} steps (SFT + DPO), {tokens:,} tokens, "
        f"{costs['seconds']:,.1f} s"
    )


def draw_rounds(
    rows: Sequence[dict[str, Any]], file: Path, *, before: Mapping[str, float | None] | None = None
) -> None:
    """Loss, and where measured the refusal rate, by round; a PNG.

    Args:
        rows: The rounds.
        file: The picture.
        before: What was measured before the first round, which becomes round 0.
    """
    rows = [{"round": 0, **before}, *rows] if before else rows
    rates = sorted({n for row in rows for n in row if n.startswith("val/") and "rate" in n})
    figure, axes = plt.subplots(1, 2 if rates else 1, figsize=(9 if rates else 5, 3.4))
    panels = [axes] if not rates else list(axes)
    _draw(panels[0], rows, ["loss", "val/loss"], "loss (nats per answer token)")
    if rates:
        _draw(panels[1], rows, rates, "percent")
        panels[1].set_ylim(-2, 102)
    figure.tight_layout()
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    """Write a picture whole or not at all."""
    scratch = file.with_suffix(".tmp.png")
    figure.savefig(scratch, dpi=120)
    plt.close(figure)
    scratch.replace(file)


def _draw(panel: Any, rows: Sequence[dict[str, Any]], names: Sequence[str], label: str) -> None:
    for name in names:
        points = [(row["round"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            text = "train/loss" if name == "loss" else name
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=text)
    panel.set_xlabel("round")
    panel.set_ylabel(label)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    panel.legend()


def _visit_counts(visits: Sequence[dict[str, Any]]) -> str:
    counts = {s: sum(v["status"] == s for v in visits) for s in _STATUSES}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def _share(row: PartitionRow) -> str:
    return "-" if row.harmful_share is None else f"{row.harmful_share:.0%}"


def _overall_share(rows: Sequence[PartitionRow]) -> str:
    known = [(row.harmful_share, row.samples) for row in rows if row.harmful_share is not None]
    if not known:
        return "-"
    return f"{sum(share * n for share, n in known) / sum(n for _, n in known):.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _csv_loggers(trainer: Trainer) -> list[RoundCSVLogger]:
    ours = [logger for logger in trainer.loggers if isinstance(logger, RoundCSVLogger)]
    return ours if trainer.is_global_zero else []
