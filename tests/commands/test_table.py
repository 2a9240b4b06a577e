import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsafe.cli import main
from fedsafe.commands import table
from fedsafe.guard_report import FIGURES
from fedsafe.table_runs import TableGuard

Captured = pytest.CaptureFixture[str]


def results(*, failed: bool) -> dict[str, Any]:
    measures = {
        "refusal_rate": {"mean": 50.0, "spread": 1.0},
        "help_rate": {"mean": 9, "spread": 0},
    }
    row: dict[str, Any] = {
        "method": "fl",
        "aggregation": "fedavg",
        "metrics": measures,
        "seconds": 3.0,
    }
    failure = {"run": "fl-fedavg-seed1", "error": "ValueError: no data"}
    shares = dict.fromkeys([*FIGURES, "recall_taught", "recall_untaught"], 0.5)
    guard = {"name": "leaky", "stage": "after", **shares}
    counts = {"judged": 100, "unsafe": 20, "dropped": 20, "refused": 0}
    counts |= {"harm": 30, "harm_left": 10}
    row["filter"] = counts
    failures = [failure] if failed else []
    return {"rows": [], "summary": [row], "guards": [guard], "failed": failures}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "table.yaml"
    file.write_text(
        json.dumps({"seeds": [0, 1], "rows": [{"method": "fl", "aggregation": "fedavg"}]})
    )
    return file


def run(config: Path, output: Path) -> int:
    return main(["table", "--config", str(config), "--output", str(output)])


def test_it_prints_the_table_and_where_the_files_are(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(table, "run_table", lambda *args, **kwargs: results(failed=False))
    assert run(config, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "fl fedavg" in out
    assert "50±1" in out
    assert "leaky  after" in out
    assert "fl fedavg: 20% of the samples unsafe, 20% dropped; 10 of 30 harmful" in out
    assert "table.json" in out
    assert (tmp_path / "out" / "table.png").exists()
    assert len(out.splitlines()) < 25


def test_a_failed_run_is_named_after_the_table_and_the_status_is_1(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(table, "run_table", lambda *args, **kwargs: results(failed=True))
    assert run(config, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "fl fedavg" in captured.out
    assert (
        "fedsafe table: 1 of 2 runs failed:\n  fl-fedavg-seed1: ValueError: no data" in captured.err
    )


def test_guards_are_given_to_the_table_and_count_as_runs(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    settings = json.loads(config.read_text())
    settings["guards"] = [{"name": "good", "configs": ["a.yaml"], "from_scratch": True}]
    config.write_text(json.dumps(settings))
    given = {}

    def run_table(*args: Any, **kwargs: Any) -> dict[str, Any]:
        given.update(kwargs)
        return results(failed=True)

    monkeypatch.setattr(table, "run_table", run_table)
    assert run(config, tmp_path / "out") == 1
    assert given["guards"] == [TableGuard("good", ("a.yaml",), from_scratch=True)]
    assert "1 of 3 runs failed" in capsys.readouterr().err


def test_a_row_with_an_unknown_setting_is_named(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "table.yaml"
    file.write_text(json.dumps({"seeds": [0], "rows": [{"method": "fl", "agregation": "fedavg"}]}))
    with pytest.raises(SystemExit) as caught:
        run(file, tmp_path / "out")
    assert caught.value.code == 2
    assert "agregation" in capsys.readouterr().err


def test_cores_are_counted_where_the_system_has_no_affinity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert table._num_cores() >= 1
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert table._num_cores() == (os.cpu_count() or 1)
