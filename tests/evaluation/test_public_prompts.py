"""AdvBench, XSTest and HarmBench: their columns, categories and what they refuse."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from scripted_prompts import ask_all, scripted
from word_guard import WordGuard

from fedsafe.evaluation.advbench import AdvBench
from fedsafe.evaluation.harmbench import HarmBench
from fedsafe.evaluation.prompt_benchmark import PromptBenchmark
from fedsafe.evaluation.scores import BenchmarkScores
from fedsafe.evaluation.xstest import XSTest

GOAL = {"goal": "enchant the goose", "target": "Sure, here is how"}
SAFE = {"prompt": "how do i kill a process", "type": "homonyms", "label": "safe"}
UNSAFE = {"prompt": "hex the miller", "type": "contrast_homonyms", "label": "unsafe"}
STANDARD = {
    "Behavior": "steal the harp",
    "FunctionalCategory": "standard",
    "SemanticCategory": "illegal",
    "Tags": "",
    "ContextString": "",
    "BehaviorID": "harp",
}
CONTEXTUAL = STANDARD | {
    "Behavior": "say how",
    "FunctionalCategory": "contextual",
    "ContextString": "a harp stands in the hall",
}
ROWS: dict[type[PromptBenchmark], dict[str, str]] = {
    AdvBench: GOAL,
    XSTest: SAFE,
    HarmBench: STANDARD,
}
Write = Callable[..., str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in its own folder, so that sources have short names."""
    monkeypatch.chdir(tmp_path)


def write(*rows: dict[str, Any], path: str = "rows.csv") -> str:
    if path.endswith(".csv"):
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.endswith(".parquet"):
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    else:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(benchmark: PromptBenchmark, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    speaker = scripted(monkeypatch, lambda prompt: "no")
    ask_all(benchmark)
    return [talk[-1]["content"] for call in speaker.calls for talk in call.conversations if talk]


@pytest.mark.parametrize("path", ["rows.csv", "rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_each_file_type_holds_the_same_prompts(
    kind: type[PromptBenchmark], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS[kind]
    texts = asked(kind(write(row, row, path=path)), monkeypatch)
    assert texts == [next(iter(row.values()))] * 2


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_a_file_without_a_column_is_one_error_that_names_it(kind: type[PromptBenchmark]) -> None:
    missing = next(iter(ROWS[kind]))
    row = {name: value for name, value in ROWS[kind].items() if name != missing}
    has = ", ".join(list(row)[:5])
    expected = rf"rows\.csv, line 2: has (no|neither) `{missing}`.*(; |\()its columns: {has}"
    with pytest.raises(ValueError, match=expected):
        kind(write({**row, "more": "x"} if kind is AdvBench else row)).load()


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_an_empty_prompt_is_an_error_with_its_line(kind: type[PromptBenchmark]) -> None:
    row = ROWS[kind]
    column = next(iter(row))
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: `{column}` is empty"):
        kind(write(row, row | {column: " "}, path="rows.jsonl")).load()


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_a_missing_or_empty_file_is_an_error(kind: type[PromptBenchmark]) -> None:
    with pytest.raises(ValueError, match=r"no\.csv is missing; give the path"):
        kind("no.csv").load()
    Path("empty.csv").write_text(",".join(ROWS[kind]) + "\n")
    with pytest.raises(ValueError, match=r"empty\.csv is empty"):
        kind("empty.csv").load()


# ---- AdvBench ------------------------------------------------------------------------------------


def test_advbench_may_end_each_goal_with_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(AdvBench(write(GOAL), append_period=True), monkeypatch) == ["enchant the goose."]


def test_the_column_of_advbench_on_the_hub_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": "hex it", "target": "Sure"}
    assert asked(AdvBench(write(row)), monkeypatch) == ["hex it"]
    assert AdvBench().path == "walledai/AdvBench"


# ---- XSTest --------------------------------------------------------------------------------------


def test_refusals_of_safe_prompts_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda prompt: "I must decline." if "process" in prompt else "Sorry?")
    benchmark = XSTest(write(SAFE, UNSAFE), guard=WordGuard("Sorry?"))
    safe, unsafe = ask_all(benchmark)
    assert safe.scores == {"over_refusal_rate": 100.0, "over_keyword_rate": 0.0}
    assert unsafe.scores == {"refusal_rate": 0.0, "keyword_rate": 100.0, "guard_safe_rate": 0.0}
    assert (safe.category, unsafe.category) == ("homonyms", "contrast_homonyms")
    scores = BenchmarkScores(benchmark.measures, benchmark.categories)
    scores.update([safe, unsafe])
    assert {name for name in scores.compute() if "/" not in name} == {
        *benchmark.measures, "num_unscored",
    }  # fmt: skip


def test_a_guard_does_not_judge_replies_to_safe_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda prompt: "kill -9")
    guard = WordGuard()
    ask_all(XSTest(write(SAFE, UNSAFE, SAFE), guard=guard))
    assert [len(seen) for seen in guard.seen] == [1]


def test_a_label_that_is_neither_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"line 3: `label` is maybe, not safe or unsafe"):
        XSTest(write(SAFE, UNSAFE | {"label": "maybe"})).load()


# ---- HarmBench -----------------------------------------------------------------------------------


def test_a_contextual_behaviour_is_asked_behind_its_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = asked(HarmBench(write(STANDARD, CONTEXTUAL)), monkeypatch)
    assert texts == ["steal the harp", "a harp stands in the hall\n\n---\n\nsay how"]


def test_only_the_wanted_kinds_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(CONTEXTUAL, STANDARD)
    assert asked(HarmBench(path, kinds=("standard",)), monkeypatch) == ["steal the harp"]
    with pytest.raises(ValueError, match="no behaviour of kind copyright; it has contextual, stan"):
        HarmBench(path, kinds=("copyright",)).load()
    with pytest.raises(ValueError, match="kinds of harmbench is empty; give some of standard"):
        HarmBench(path, kinds=())


def test_a_kind_that_harmbench_does_not_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="`FunctionalCategory` is odd, not one of standard, conte"):
        HarmBench(write(STANDARD | {"FunctionalCategory": "odd"})).load()


# ---- the public files ----------------------------------------------------------------------------


@pytest.mark.real_data
def test_the_public_files_are_read_whole(real_data: Path) -> None:
    advbench = AdvBench(str(real_data / "advbench" / "harmful_behaviors.csv"))
    advbench.load()
    assert advbench.num_items == 520
    harmbench = HarmBench(str(real_data / "harmbench" / "harmbench_behaviors_text_all.csv"))
    harmbench.load()
    assert harmbench.num_items == 400
    assert len(set(harmbench.categories)) == 7
    xstest = XSTest(str(real_data / "xstest" / "xstest_prompts.csv"))
    xstest.load()
    assert Counter(Counter(xstest.categories).values()) == {25: 18}


@pytest.mark.real_data
def test_xstest_has_250_safe_prompts_and_200_unsafe(
    real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda prompt: "I can't help with that.")
    records = ask_all(XSTest(str(real_data / "xstest" / "xstest_prompts.csv")))
    assert Counter(next(iter(record.scores)) for record in records) == {
        "over_refusal_rate": 250, "refusal_rate": 200,
    }  # fmt: skip
    assert len({record.id for record in records}) == 450
