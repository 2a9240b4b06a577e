import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from fedsafe.evaluation.guard_evaluation import Choice, GuardResult
from fedsafe.evaluation.guard_metrics import guard_scores
from fedsafe.guard_report import (
    MAX_GROUP_ROWS,
    choice_lines,
    draw_precision_recall,
    filtered_table,
    guards_markdown,
    guards_table,
)

PROBABILITIES = np.array([0.9, 0.8, 0.7, 0.4, 0.2, 0.1])
LABELS = np.array([True, False, True, True, False, False])
SCORES = guard_scores(PROBABILITIES, LABELS, threshold=0.5)


def result(name: str, **changes: Any) -> GuardResult:
    values: dict[str, Any] = {
        "name": name,
        "identity": "x",
        "threshold": 0.5,
        "probabilities": PROBABILITIES,
        "labels": LABELS,
        "overall": SCORES,
        "by_category": {},
        "by_client": {},
        "shortened": 0,
        "choice": None,
    }
    return GuardResult(**{**values, **changes})


def rendered(table: Table) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_guards_fit_a_terminal_of_80_columns_uncut() -> None:
    text = rendered(guards_table([result("llama-guard-3-8b"), result("after", threshold=0.12345)]))
    assert "…" not in text
    for heading in ("threshold", "accuracy", "precision", "recall", "F1", "AUPRC", "FPR"):
        assert heading in text
    [line] = [line for line in text.splitlines() if "after" in line]
    assert line.split() == ["after", "0.12345", "66.7", "66.7", "66.7", "66.7", "80.6", "33.3"]
    assert "6 labelled samples, 3 of them unsafe" in text


def test_markdown_has_the_largest_groups_and_says_how_many_more() -> None:
    groups = {f"c{n:03}": SCORES._replace(samples=n + 1) for n in range(MAX_GROUP_ROWS + 5)}
    text = guards_markdown([result("g", by_client=groups)])
    assert "## g, by client" in text
    assert f"| c{MAX_GROUP_ROWS + 4:03} | {MAX_GROUP_ROWS + 5} |" in text
    assert text.count("| c0") == MAX_GROUP_ROWS
    assert "c004" not in text
    assert "5 smaller ones are in guards.json." in text
    assert "by category" not in text


def test_a_name_cannot_break_a_markdown_table() -> None:
    text = guards_markdown([result("a|b")])
    assert "| a\\|b | 0.5 |" in text


def test_a_chosen_threshold_says_what_it_costs() -> None:
    given = guard_scores(PROBABILITIES, LABELS, threshold=0.8)
    choice = Choice(0.95, samples=40, recall=0.96, given_threshold=0.8, given=given)
    [line] = choice_lines([result("g", choice=choice), result("h")])
    assert line == (
        "g: the threshold 0.5 was chosen on 40 other samples for a recall of 95.0 and has 96.0 "
        "there. Here it has 66.7 and flags 33.3 % of the safe; the threshold 0.8 has 33.3 and "
        "flags 33.3 %."
    )


def test_a_threshold_that_is_typed_in_again_flags_what_it_did() -> None:
    for threshold, text in {0.998780999: "0.99878", 0.99999999: "0.999999", 0.3: "0.3"}.items():
        given = result("g", threshold=threshold)
        assert f" {text} " in rendered(guards_table([given]))
        assert f"| g | {text} |" in guards_markdown([given])
        choice = Choice(0.9, samples=4, recall=1.0, given_threshold=threshold, given=SCORES)
        [line] = choice_lines([result("g", threshold=threshold, choice=choice)])
        assert line.count(f"the threshold {text} ") == 2


def test_the_picture_marks_each_guard_where_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    draw_precision_recall([result("before"), result("after", threshold=0.1)], tmp_path / "a.png")
    [figure] = kept
    [panel] = figure.axes
    lines = {line.get_label(): line for line in panel.lines}
    assert list(lines) == [
        "before",
        "before at threshold 0.5",
        "after",
        "after at threshold 0.1",
        "chance: 50% are unsafe",
    ]
    ((recall, precision),) = lines["before at threshold 0.5"].get_xydata()
    assert (recall, precision) == (SCORES.recall, SCORES.precision)
    curve = lines["before"].get_xydata()
    assert np.isclose(curve, [recall, precision]).all(axis=1).any()
    looks = {(lines[name].get_color(), lines[name].get_linestyle()) for name in ("before", "after")}
    assert len({colour for colour, _ in looks}) == len({style for _, style in looks}) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_summary_of_a_filtered_file_says_what_became_of_its_rows() -> None:
    summary = {
        "filter": "refuse, pair, threshold 0.5, g 1234",
        "rows": 1234,
        "kept": 1200,
        "rejected": 4,
        "bad": 30,
        "unsafe": 100,
        "refused": 96,
        "shortened": 7,
        "categories": {"S1": 90, "S2": 1000},
        "labelled": SCORES._asdict(),
        "seconds": 2.0,
        "rows_per_second": 617.0,
    }
    text = " ".join(rendered(filtered_table(summary)).replace("│", " ").split())
    assert "rows 1,234" in text
    assert "kept 1,200, 96 with a refusal" in text
    assert "bad 30" in text
    assert "unsafe 100 (S1 90, S2 1,000)" in text
    assert "shortened 7 did not fit the guard's window" in text
    assert "accuracy 66.7, precision 66.7" in text
    assert "2.0 s, 617 rows/s" in text
    plain = {**summary, "labelled": None, "shortened": 0, "refused": 0, "categories": {}}
    text = rendered(filtered_table(plain))
    assert not any(word in text for word in ("percent", "shortened", "refusal", "S1"))
