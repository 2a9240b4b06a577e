"""A file through a filter, row by row: what is kept, what is not, and nothing lost.

Holds one window of rows at a time, so that memory does not grow with the file.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedsafe.data.output_files import OutputFiles, check_jsonl, json_line
from fedsafe.data.sources import (
    CheckedRow,
    Rejected,
    bad_rows_error,
    iterate_file,
    no_rows_error,
    place_of,
    with_answer,
)
from fedsafe.peers import ALONE, Peers, groups_of
from fedsafe.safety.filter import SafetyFilter, verdict_columns
from fedsafe.safety.score_cache import CHUNK_SIZE
from fedsafe.types import Sample, Verdict

OnBadRow = Literal["error", "skip"]

_SUSPICIOUS_ROWS = 20
"""A window of so many rows, most of which cannot be judged, speaks of the guard and not of them."""
_SEED = 0
"""Which refusal a sample gets depends on its text alone: the same file gives the same file."""


class FilteredRow(NamedTuple):
    """A row that was judged."""

    record: dict[str, Any]
    """As the file has it."""
    sample: Sample
    verdict: Verdict
    unsafe: bool
    kept: dict[str, Any] | None
    """The record as it is kept, perhaps with a refusal for an answer; None if it is dropped."""

    @property
    def action(self) -> Literal["kept", "refused", "dropped"]:
        """What became of it, in the words of a run's `filter.jsonl`."""
        if self.kept is None:
            return "dropped"
        return "kept" if self.kept is self.record else "refused"


def usable_rows(name: str) -> Iterator[CheckedRow]:
    """The rows of a file; what JSON lines cannot hold, such as an image's bytes, is a bad row."""
    for row in iterate_file(name):
        try:
            json_line(row.record)
        except TypeError as error:
            assert row.sample is not None
            yield CheckedRow({}, None, Rejected(name, row.sample["row"], str(error)))
        else:
            yield row


def count_rows(name: str, *, on_bad_row: OnBadRow) -> int:
    """Count a file's rows before any is judged.

    Raises:
        ValueError: If rows are bad and are not to be skipped, or no row can be used.
    """
    num, bad = 0, []
    for row in usable_rows(name):
        num += 1
        if row.rejected is not None:
            bad.append(row.rejected)
    if bad and on_bad_row == "error":
        raise bad_rows_error(bad, total=num)
    if len(bad) == num:
        raise no_rows_error(bad, names=[name])
    return num


def filtered(
    rows: Iterable[CheckedRow],
    safety: SafetyFilter,
    *,
    on_bad_row: OnBadRow = "skip",
    peers: Peers = ALONE,
) -> Iterator[Sequence[FilteredRow | Rejected]]:
    """Judge rows, a window at a time; bad rows stay where they are between the others.

    A window is as much as the filter keeps on disk at once: what is killed loses the windows that
    are judged at the time, one a rank.

    Raises:
        ValueError: If the guard cannot judge a row, and such rows are not to be skipped; or if it
            can judge none at all, or less than half of a window.
    """
    all_reasons: Counter[str] = Counter()
    num_judged = 0
    for together in groups_of(groups_of(rows, CHUNK_SIZE), peers.size):
        asked = [[row.sample["messages"] for row in window if row.sample] for window in together]
        found = safety.judge_windows(asked, peers=peers)
        for rows_before, (verdicts, reasons) in zip(together, found, strict=True):
            window = _without_unjudged(rows_before, reasons, on_bad_row=on_bad_row)
            num_usable = len(verdicts) + len(reasons)
            if num_usable >= _SUSPICIOUS_ROWS and 2 * len(reasons) > num_usable:
                raise _wrong_guard(Counter(reasons.values()), safety, num_usable=num_usable)
            all_reasons.update(reasons.values())
            num_judged += len(verdicts)
            in_order = iter(verdicts.values())
            yield [row.rejected or _apply(row, safety, next(in_order)) for row in window]
    if all_reasons and num_judged == 0:
        raise _wrong_guard(all_reasons, safety, num_usable=all_reasons.total())


def _wrong_guard(reasons: Counter[str], safety: SafetyFilter, *, num_usable: int) -> ValueError:
    (commonest, _) = reasons.most_common(1)[0]
    return ValueError(
        f"the guard {safety.guard.name} cannot judge {reasons.total():,} of {num_usable:,} rows, "
        f"most often: {commonest}; likely the guard is set up wrongly, otherwise take these rows "
        "out"
    )


def _without_unjudged(
    window: Sequence[CheckedRow], reasons: Mapping[int, str], *, on_bad_row: OnBadRow
) -> list[CheckedRow]:
    """The rows of a window; one that the guard cannot judge is a bad one now.

    Args:
        window: The rows.
        reasons: Why it cannot, by the number of the row among the good ones.
        on_bad_row: Whether such rows are an error.
    """
    good = [place for place, row in enumerate(window) if row.sample is not None]
    left = list(window)
    for index, reason in reasons.items():
        sample = left[good[index]].sample
        assert sample is not None
        source, row = sample["source"], sample["row"]
        if on_bad_row == "error":
            raise ValueError(
                f"{place_of(source, row)}: cannot be judged: {reason}; take the row out, or set "
                "on_bad_row: skip"
            )
        left[good[index]] = CheckedRow(
            {}, None, Rejected(source, row, f"cannot be judged: {reason}")
        )
    return left


def _apply(row: CheckedRow, safety: SafetyFilter, verdict: Verdict) -> FilteredRow:
    assert row.sample is not None
    unsafe = safety.is_unsafe(verdict)
    kept: dict[str, Any] | None = row.record
    if unsafe and safety.policy == "drop":
        kept = None
    elif unsafe and safety.policy == "refuse":
        refusal = safety.refused(row.sample["messages"], seed=_SEED)[-1]["content"]
        kept = with_answer(row.record, refusal)
        if row.sample["label"] is not None:
            kept["label"] = "safe"  # the answer that the label was about is gone
    return FilteredRow(row.record, row.sample, verdict, unsafe, kept)


class Outputs:
    """The files of one filtering, beside each other; see `OutputFiles`.

    Args:
        kept: JSONL file for the rows that are kept; its name gives those of the others.
        rejected: JSONL file for those that are dropped; None is `NAME.rejected.jsonl`.
    """

    def __init__(self, kept: Path, rejected: Path | None = None) -> None:
        check_jsonl(kept)
        self.kept = kept
        self.rejected = rejected or kept.with_suffix(".rejected.jsonl")
        check_jsonl(self.rejected)
        self.judged = kept.with_suffix(".filter.jsonl")
        self.bad = kept.with_suffix(".bad.jsonl")
        self.summary = kept.with_suffix(".summary.json")
        paths = (self.rejected, self.judged, self.bad, self.summary, self.kept)
        if len(set(paths)) < len(paths):
            raise ValueError(f"{self.rejected} is another output too; give --rejected another name")
        self.files = OutputFiles(paths, unless_empty=(self.bad,))

    def write(self, row: FilteredRow | Rejected) -> None:
        """Write a row to the files that it belongs to."""
        if isinstance(row, Rejected):
            self.files.write(self.bad, row._asdict())
            return
        verdict = verdict_columns(row.verdict)
        place = {name: row.sample[name] for name in ("client", "source", "row")}
        self.files.write(self.judged, {**place, **verdict, "action": row.action})
        if row.kept is None:
            self.files.write(self.rejected, _with_verdict(row.record, verdict))
        else:
            self.files.write(self.kept, row.kept)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write what came out."""
        self.files.write_summary(self.summary, summary)


def _with_verdict(record: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any]:
    """The record with a column `verdict`, or `verdict_2` where an earlier filter wrote that."""
    name, number = "verdict", 1
    while name in record:
        number += 1
        name = f"verdict_{number}"
    return {**record, name: verdict}
