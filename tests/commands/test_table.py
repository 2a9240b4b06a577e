import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsafe.cli import main
from fedsafe.commands import table

Captured = pytest.CaptureFixture[str]


def results(*, failed: bool) -> dict[str, Any]:
    measures = {
        "refusal_rate": {"mean": 50.0, "spread": 1.0},
        "help_rate": {"mean": 9, "spread": 0},
    }
    row = {"method": "fl", "aggregation": "fedavg", "metrics": measures, "seconds": 3.0}
    failure = {"run": "fl-fedavg-seed1", "error": "ValueError: no data"}
    return {"rows": [], "summary": [row], "failed": [failure] if failed else []}


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
    assert "fl · fedavg" in out
    assert "50 ±1" in out
    assert "table.json" in out
    assert (tmp_path / "out" / "table.png").exists()
    assert len(out.splitlines()) < 15


def test_a_failed_run_is_named_after_the_table_and_the_status_is_1(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(table, "run_table", lambda *args, **kwargs: results(failed=True))
    assert run(config, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "fl · fedavg" in captured.out
    assert (
        "fedsafe table: 1 of 2 runs failed:\n  fl-fedavg-seed1: ValueError: no data" in captured.err
    )


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
