"""The safety filter on every client's samples: what each trains on, and what the guard said.

Verdicts stay with the client, in `filter.jsonl`; what the server's side sees are counts, in
`filter.json`.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from warnings import warn

import datasets
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from fedsafe.data.output_files import write_whole
from fedsafe.data.sources import Rejected, bad_rows_error, no_rows_error, report_rejected
from fedsafe.federated.partition import Partition
from fedsafe.peers import ALONE, Peers, groups_of
from fedsafe.safety.filter import Policy, SafetyFilter, verdict_columns
from fedsafe.safety.score_cache import CHUNK_SIZE
from fedsafe.types import Verdict

_CLIENTS_NAMED = 10

Indices = NDArray[np.int64]


class FilterRow(NamedTuple):
    """What the filter did to one client's samples, in numbers."""

    client: str
    judged: int
    unsafe: int
    dropped: int
    refused: int
    left: int
    """Samples to train on."""
    hits: int
    """Called unsafe and labelled so."""
    false_alarms: int
    """Called unsafe and labelled safe."""
    misses: int
    """Called safe and labelled unsafe."""

    @property
    def precision(self) -> float | None:
        """Share of what was called unsafe that is labelled so; None where nothing was."""
        called = self.hits + self.false_alarms
        return self.hits / called if called else None

    @property
    def recall(self) -> float | None:
        """Share of what is labelled unsafe that was called so; None where nothing is."""
        labelled = self.hits + self.misses
        return self.hits / labelled if labelled else None


@dataclass(frozen=True)
class FilterReport:
    """What the filter did to everyone's samples, in numbers."""

    guard: str
    policy: Policy
    threshold: float
    clients: list[FilterRow]
    held_out: FilterRow
    """The samples held out for validation."""
    num_shortened: int
    """Samples of which the guard saw the beginning and end only."""
    num_unjudged: int
    """Samples that the guard could not judge, which are left out and counted nowhere else."""

    @property
    def total(self) -> FilterRow:
        """All clients together, without the samples held out."""
        counts = np.array([row[1:] for row in self.clients]).sum(axis=0)
        return FilterRow(f"all {len(self.clients):,}", *counts.tolist())

    def as_dict(self) -> dict[str, Any]:
        """The contents of `filter.json`."""
        total, held_out = self.total._asdict(), self.held_out._asdict()
        del total["client"], held_out["client"]
        return {
            "guard": self.guard,
            "policy": self.policy,
            "threshold": self.threshold,
            "total": total,
            "held_out": held_out,
            "shortened": self.num_shortened,
            "unjudged": self.num_unjudged,
            "clients": [row._asdict() for row in self.clients],
        }


@dataclass(frozen=True)
class FilteredSamples:
    """The samples after the filter.

    Attributes:
        tokens: The tokens of all samples, then those of the repaired ones.
        partition: Which of them each client trains on.
        validation: Which of them are held out.
        report: What was done, in numbers.
    """

    tokens: datasets.Dataset
    partition: Partition
    validation: Indices
    report: FilterReport
    _record: "_Record"

    def write(self, folder: Path) -> None:
        """Write `filter.jsonl`, a line a judged sample, and `filter.json`, counts; each whole."""
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in self._record.lines())
        write_whole(folder / "filter.jsonl", lines)
        counts = json.dumps(self.report.as_dict(), ensure_ascii=False, indent=1) + "\n"
        write_whole(folder / "filter.json", [counts])


def filter_samples(  # noqa: PLR0913
    rule: SafetyFilter,
    *,
    samples: datasets.Dataset,
    tokens: datasets.Dataset,
    partition: Partition,
    validation: Indices,
    tokenize: Callable[[datasets.Dataset], datasets.Dataset],
    seed: int,
    on_bad_row: Literal["error", "skip"] = "error",
    rejected: Path | None = None,
    peers: Peers = ALONE,
) -> FilteredSamples:
    """Let every client judge its samples, and do with the unsafe ones what the policy says.

    Clients keep their numbers and the samples that stay keep their places, so that one client's
    loss changes no other's random draws.

    Args:
        rule: The guard, the policy and the threshold.
        samples: As `data.sources.load_samples` returns them.
        tokens: As `data.tokens.tokenize_samples` makes of them.
        partition: Which of the tokens' rows each client has.
        validation: Which of them are held out.
        tokenize: Makes tokens of repaired samples, as `tokens` was made; may leave some out.
        seed: Decides, with each sample's content, which refusal it gets.
        on_bad_row: `error` stops at samples that the guard cannot judge; `skip` leaves them out.
        rejected: JSONL file to which samples that are left out so are added; one rank has one.
        peers: Ranks that share the judging; all are given the same samples, and have all verdicts.

    Raises:
        ValueError: If nearly everything is unsafe, no client has a sample left, or samples cannot
            be judged and are not to be skipped.
    """
    judged = samples.select(tokens["sample"][:])
    verdicts = _judge(rule, judged, skip=on_bad_row == "skip", rejected=rejected, peers=peers)
    is_unsafe = verdicts.is_unsafe
    rule.check_share(int(is_unsafe.sum()), num_judged=int(verdicts.is_judged.sum()))
    new = np.where(verdicts.is_judged, np.arange(len(judged)), -1)
    if rule.policy != "keep":
        new[is_unsafe] = -1
    if rule.policy == "refuse" and is_unsafe.any():
        places = np.flatnonzero(is_unsafe)
        repaired = tokenize(_repaired(judged.select(places), rule, seed=seed))
        new[places[np.asarray(repaired["sample"][:])]] = len(tokens) + np.arange(len(repaired))
        tokens = datasets.concatenate_datasets([tokens, repaired])
    left = partition.renumbered(new)
    _report_lost_clients(partition, left)
    held_out = new[validation]
    record = _Record(rule, judged, verdicts, new, partition, validation)
    return FilteredSamples(
        tokens=tokens,
        partition=left,
        validation=held_out[held_out >= 0],
        report=_report(record),
        _record=record,
    )


@dataclass(frozen=True)
class _Verdicts:
    """What the guard said of each of many samples, in a few bytes each."""

    unsafe: NDArray[np.float64]
    """Probability; NaN where the guard could not judge."""
    is_unsafe: NDArray[np.bool_]
    is_shortened: NDArray[np.bool_]
    categories: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Where there are any."""

    @property
    def is_judged(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.unsafe)

    def put(self, place: int, verdict: Verdict, *, is_unsafe: bool) -> None:
        self.unsafe[place] = verdict.unsafe
        self.is_unsafe[place] = is_unsafe
        self.is_shortened[place] = verdict.shortened
        if verdict.categories:
            self.categories[place] = verdict.categories


def _judge(
    rule: SafetyFilter,
    samples: datasets.Dataset,
    *,
    skip: bool,
    rejected: Path | None,
    peers: Peers,
) -> _Verdicts:
    """Judge samples, as many at a time as are kept on disk at once."""
    num = len(samples)
    verdicts = _Verdicts(np.full(num, np.nan), np.zeros(num, np.bool_), np.zeros(num, np.bool_))
    bad: list[Rejected] = []
    why = f"the guard {rule.guard.name} cannot judge it: "
    for start, rows, judged, reasons in _windows(rule, samples, peers):
        for index, verdict in judged.items():
            verdicts.put(start + index, verdict, is_unsafe=rule.is_unsafe(verdict))
        bad += [
            Rejected(rows["source"][index], rows["row"][index], f"{why}{reason}")
            for index, reason in sorted(reasons.items())
        ]
        if bad and not skip:
            raise bad_rows_error(bad, total=start + len(rows["row"]))
    if len(bad) == num:
        raise no_rows_error(bad, names=sorted({each.source for each in bad}))
    if bad:
        report_rejected(bad, total=num, rejected=rejected)
    return verdicts


def _windows(
    rule: SafetyFilter, samples: datasets.Dataset, peers: Peers
) -> Iterator[tuple[int, dict[str, Any], dict[int, Verdict], dict[int, str]]]:
    """Each window's first place, its rows, their verdicts and why others have none, by index."""
    title = f"Judging with {rule.guard.name}"
    starts = _starts(len(samples), title=title, shown=peers.index == 0)
    for together in groups_of(starts, peers.size):
        windows = [samples[start : start + CHUNK_SIZE] for start in together]
        found = rule.judge_windows([rows["messages"] for rows in windows], peers=peers)
        for start, rows, (judged, reasons) in zip(together, windows, found, strict=True):
            yield start, rows, judged, reasons


def _starts(num: int, *, title: str, shown: bool) -> Iterable[int]:
    """Where each window of `CHUNK_SIZE` starts; progress may be shown where there are several."""
    starts = range(0, num, CHUNK_SIZE)
    if len(starts) < 2:
        return starts
    return track(starts, description=title, console=Console(stderr=True), disable=not shown)


def _repaired(samples: datasets.Dataset, rule: SafetyFilter, *, seed: int) -> datasets.Dataset:
    """The samples with refusals as their responses; labelled ones are safe now."""
    columns = samples.to_dict()
    columns["messages"] = [rule.refused(each, seed=seed) for each in columns["messages"]]
    columns["label"] = [label and "safe" for label in columns["label"]]
    return datasets.Dataset.from_dict(columns, features=samples.features)


def _report_lost_clients(before: Partition, after: Partition) -> None:
    if len(after.order) == 0:
        raise ValueError(
            f"the safety filter leaves none of {len(before.order):,} samples, there is nothing to "
            "train on; raise its threshold, or set policy: refuse or keep"
        )
    lost = np.flatnonzero((after.sizes == 0) & (before.sizes > 0)).tolist()
    if lost:
        named = ", ".join(before.names[client] for client in lost[:_CLIENTS_NAMED])
        more = ", ..." if len(lost) > _CLIENTS_NAMED else ""
        warn(
            f"{len(lost)} of {len(before)} clients have no sample left after the safety filter and "
            f"take no part: {named}{more}",
            stacklevel=2,
        )


class _Record(NamedTuple):
    """Each row's verdict and fate."""

    rule: SafetyFilter
    samples: datasets.Dataset
    verdicts: _Verdicts
    new: Indices
    """Number of the row that each row became; -1 for none."""
    partition: Partition
    """As it was before the filter."""
    validation: Indices

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines of `filter.jsonl`."""
        sources, rows = self.samples["source"][:], self.samples["row"][:]
        verdicts = self.verdicts
        for client, place in self._places():
            verdict = Verdict(
                float(verdicts.unsafe[place]),
                verdicts.categories.get(place, ()),
                self.rule.guard.name,
                bool(verdicts.is_shortened[place]),
            )
            line = {
                "client": client,
                "source": sources[place],
                "row": rows[place],
                **verdict_columns(verdict),
                "action": self._action(place),
            }
            if self.rule.record_text:
                line["messages"] = self.samples[place]["messages"]
            yield line

    def _places(self) -> Iterator[tuple[str | None, int]]:
        """The rows that were judged, client after client; those held out are nobody's."""
        is_judged = self.verdicts.is_judged
        for client, name in enumerate(self.partition.names):
            held = self.partition.samples_of(client)
            yield from ((name, place) for place in held[is_judged[held]].tolist())
        held_out = self.validation[is_judged[self.validation]]
        yield from ((None, place) for place in held_out.tolist())

    def _action(self, place: int) -> str:
        if self.new[place] == place:
            return "kept"
        return "dropped" if self.new[place] < 0 else "refused"


def _report(record: _Record) -> FilterReport:
    label = np.asarray(record.samples["label"], dtype=object)
    is_judged, is_unsafe = record.verdicts.is_judged, record.verdicts.is_unsafe
    columns = (
        is_judged,
        is_unsafe,
        is_judged & (record.new < 0),
        record.new >= len(label),
        record.new >= 0,
        is_unsafe & (label == "unsafe"),
        is_unsafe & (label == "safe"),
        is_judged & ~is_unsafe & (label == "unsafe"),
    )
    counts = np.stack([record.partition.sums(column) for column in columns], axis=1).tolist()
    held_out = [int(column[record.validation].sum()) for column in columns]
    rule = record.rule
    return FilterReport(
        guard=rule.guard.name,
        policy=rule.policy,
        threshold=rule.threshold,
        clients=[FilterRow(n, *c) for n, c in zip(record.partition.names, counts, strict=True)],
        held_out=FilterRow("held out", *held_out),
        num_shortened=int(record.verdicts.is_shortened.sum()),
        num_unjudged=int((~is_judged).sum()),
    )
