"""The safety filter on every client's samples: what each trains on, and what the guard said.

Verdicts stay with the client, in `filter.jsonl`; what the server's side sees are counts.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from warnings import warn

import datasets
import numpy as np
from numpy.typing import NDArray

from fedsafe.data.sources import place_of
from fedsafe.federated.partition import Partition
from fedsafe.safety.filter import Policy, SafetyFilter
from fedsafe.safety.guard import UnjudgeableError
from fedsafe.types import Verdict

_CLIENTS_NAMED = 10
_DIGITS = 6

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

    @property
    def total(self) -> FilterRow:
        """All clients together, without the samples held out."""
        counts = np.array([row[1:] for row in self.clients]).sum(axis=0)
        return FilterRow(f"all {len(self.clients):,}", *counts.tolist())


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

    def write(self, file: Path) -> None:
        """Write a line a judged sample, client after client; whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(file.name + ".tmp")
        with scratch.open("w", encoding="utf-8") as out:
            for line in self._record.lines():
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        scratch.replace(file)


def filter_samples(
    rule: SafetyFilter,
    *,
    samples: datasets.Dataset,
    tokens: datasets.Dataset,
    partition: Partition,
    validation: Indices,
    tokenize: Callable[[datasets.Dataset], datasets.Dataset],
    seed: int,
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

    Raises:
        ValueError: If nearly everything is unsafe, no client has a sample left, or a sample cannot
            be judged.
    """
    judged = samples.select(tokens["sample"][:])
    try:
        verdicts = rule.verdicts(judged["messages"])
    except UnjudgeableError as error:
        index, reason = next(iter(error.reasons.items()))
        row = judged[index]
        raise ValueError(
            f"{place_of(row['source'], row['row'])}: the guard {rule.guard.name} cannot judge it: "
            f"{reason}; take the row out of the data, or change the guard's settings"
        ) from error
    is_unsafe = np.array([rule.is_unsafe(verdict) for verdict in verdicts])
    rule.check_share(int(is_unsafe.sum()), num_judged=len(verdicts))
    new = np.arange(len(verdicts))
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
        report=_report(record, is_unsafe),
        _record=record,
    )


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
    verdicts: Sequence[Verdict]
    new: Indices
    """Number of the row that each row became; -1 for none."""
    partition: Partition
    """As it was before the filter."""
    validation: Indices

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines of `filter.jsonl`."""
        sources, rows = self.samples["source"][:], self.samples["row"][:]
        for client, place in self._places():
            verdict = self.verdicts[place]
            line = {
                "client": client,
                "source": sources[place],
                "row": rows[place],
                "unsafe": round(verdict.unsafe, _DIGITS),
                "categories": list(verdict.categories),
                "guard": verdict.guard,
                "action": self._action(place),
            }
            if verdict.shortened:
                line["shortened"] = True
            if self.rule.record_text:
                line["messages"] = self.samples[place]["messages"]
            yield line

    def _places(self) -> Iterator[tuple[str | None, int]]:
        """The rows, client after client; those held out are nobody's."""
        for client, name in enumerate(self.partition.names):
            yield from ((name, place) for place in self.partition.samples_of(client).tolist())
        yield from ((None, place) for place in self.validation.tolist())

    def _action(self, place: int) -> str:
        if self.new[place] == place:
            return "kept"
        return "dropped" if self.new[place] < 0 else "refused"


def _report(record: _Record, is_unsafe: NDArray[np.bool_]) -> FilterReport:
    label = np.asarray(record.samples["label"], dtype=object)
    ones = np.ones(len(label), dtype=np.bool_)
    columns = (
        ones,
        is_unsafe,
        record.new < 0,
        record.new >= len(label),
        record.new >= 0,
        is_unsafe & (label == "unsafe"),
        is_unsafe & (label == "safe"),
        ~is_unsafe & (label == "unsafe"),
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
        num_shortened=sum(verdict.shortened for verdict in record.verdicts),
    )
