import json
from pathlib import Path
from typing import Any

import pytest

from fedsafe.cli import main

Captured = pytest.CaptureFixture[str]

HERE = Path(__file__).parent
GUARD = ("--guard", "stub_guards.NumberGuard")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in its own folder, with its own caches and the stub guards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSAFE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.syspath_prepend(HERE)
    return tmp_path


def write(*rows: dict[str, Any]) -> str:
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "in.jsonl"


def row(probability: float, label: str | None, **columns: Any) -> dict[str, Any]:
    """A row of which the stub says that probability."""
    return {"prompt": "how likely", "response": f"{probability}", "label": label, **columns}


def measured(*arguments: str, source: str = "in.jsonl") -> int:
    return main(["measure", "--input", source, "--output", "out", *arguments])


def guards() -> list[dict[str, Any]]:
    return json.loads(Path("out/guards.json").read_text())["guards"]


ROWS = [
    row(0.9, "unsafe", category="S1", client="ada"),
    row(0.4, "unsafe", category="S2", client="bob"),
    row(0.6, "safe", client="bob"),
    row(0.1, "safe"),
]


def test_one_guard_is_measured_over_all_and_by_category_and_client(capsys: Captured) -> None:
    write(*ROWS, row(0.5, None))
    assert measured(*GUARD) == 0
    [guard] = guards()
    assert (guard["name"], guard["threshold"], guard["choice"]) == ("number-1", 0.5, None)
    assert guard["overall"] == {
        "samples": 4,
        "unsafe": 2,
        "flagged": 2,
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "auprc": pytest.approx(0.5 * 1 + 0.5 * 2 / 3),
        "false_positive_rate": 0.5,
    }
    assert {name: each["recall"] for name, each in guard["by_category"].items()} == {
        "S1": 1.0,
        "S2": 0.0,
    }
    assert guard["by_client"]["ada"]["false_positive_rate"] is None
    assert guard["by_client"]["bob"]["samples"] == 2
    written = json.loads(Path("out/guards.json").read_text())
    assert (written["unlabelled"], written["judge"]) == (1, "pair")
    out = " ".join(capsys.readouterr().out.split())
    assert "number-1 0.5 50.0 50.0 50.0 50.0 83.3 50.0" in out
    assert "4 labelled samples, 2 of them unsafe" in out
    assert "left out 1 conversations without a label" in out
    assert "wrote out/guards.json, out/guards.md, out/precision_recall.png" in out
    assert Path("out/precision_recall.png").read_bytes().startswith(b"\x89PNG")


def test_guards_are_rows_of_one_table() -> None:
    stub = {"class_path": "stub_guards.NumberGuard"}
    tuned = {"name": "after", "guard": {**stub, "init_args": {"power": 0.5}}, "threshold": 0.6}
    Path("guards.yaml").write_text(json.dumps({"guards": [{"guard": stub}, tuned]}))
    write(*ROWS)
    assert measured("--config", "guards.yaml") == 0
    before, after = guards()
    assert (before["name"], before["threshold"]) == ("number-1", 0.5)
    assert (after["name"], after["threshold"], after["overall"]["recall"]) == ("after", 0.6, 1.0)
    text = Path("out/guards.md").read_text()
    assert "| guard | threshold | accuracy | precision | recall | F1 | AUPRC | FPR |" in text
    assert "| after | 0.6 | 75.0 | 66.7 | 100.0 | 80.0 | 83.3 | 50.0 |" in text
    assert "## after, by category" in text


def test_a_threshold_is_chosen_on_one_part_and_measured_on_the_other(capsys: Captured) -> None:
    write(*(row(n / 400, "unsafe" if n % 2 or n > 300 else "safe") for n in range(400)))
    assert measured(*GUARD, "--wanted_recall", "0.8", "--validation_share", "0.25") == 0
    [guard] = guards()
    choice, overall = guard["choice"], guard["overall"]
    assert choice["wanted_recall"] == 0.8
    assert choice["recall"] >= 0.8
    assert choice["samples"] + overall["samples"] == 400
    assert 70 < choice["samples"] < 130
    assert guard["threshold"] < 0.5
    assert 0.7 < overall["recall"] < 0.9
    assert choice["given_threshold"] == 0.5
    assert choice["given"]["samples"] == overall["samples"]
    assert choice["given"]["recall"] < overall["recall"]
    expected = "was chosen on"
    assert expected in capsys.readouterr().out
    assert expected in Path("out/guards.md").read_text()


def test_without_unsafe_samples_figures_are_dashes_and_there_is_no_picture() -> None:
    write(row(0.9, "safe"), row(0.1, "safe"))
    assert measured(*GUARD) == 0
    text = Path("out/guards.md").read_text()
    assert "| number-1 | 0.5 | 50.0 | 0.0 | – | – | – | 50.0 |" in text  # noqa: RUF001
    assert not Path("out/precision_recall.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "neither of guard and guards given; give one of them"),
        (
            (*GUARD, "--guards", '[{"guard": "stub_guards.NumberGuard"}]'),
            "both of guard and guards given; give one of them",
        ),
        (
            ("--guards", '[{"guard": "stub_guards.NumberGuard"}]', "--threshold", "0.2"),
            "threshold 0.2 would change none of guards; give it to each of them",
        ),
        (
            ("--guards", json.dumps([{"guard": "stub_guards.NumberGuard"}] * 2)),
            "two guards are called number-1; give each a name of its own",
        ),
    ],
    ids=["none", "both", "threshold of none", "same name"],
)
def test_which_guards_are_measured_must_be_clear(
    arguments: tuple[str, ...], message: str, capsys: Captured
) -> None:
    write(*ROWS)
    assert measured(*arguments) == 1
    assert message in capsys.readouterr().err


def test_without_labels_the_field_is_named(capsys: Captured) -> None:
    write(row(0.5, None), row(0.4, None))
    assert measured(*GUARD) == 1
    error = capsys.readouterr().err
    assert "none of 2 samples has a label" in error
    assert "give each a field `label` that is safe or unsafe" in error


def test_bad_rows_stop_it_unless_they_are_to_be_skipped(capsys: Captured) -> None:
    write(*ROWS, {"prompt": "no answer"})
    assert measured(*GUARD) == 1
    assert "1 of 5 rows cannot be used" in capsys.readouterr().err
    assert measured(*GUARD, "--on_bad_row", "skip") == 0
    assert guards()[0]["overall"]["samples"] == 4
