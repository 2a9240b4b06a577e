import csv
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsafe import table_workers
from fedsafe.cli import main
from fedsafe.commands import table
from fedsafe.data.folder_lock import only_here
from fedsafe.table_settings import TableGuard, TableSettings

Captured = pytest.CaptureFixture[str]
MEASURES = {"advbench/keyword_rate": 72.5, "mt_bench/score": 2.7, "mt_bench/num_unscored": 2}


def results(*, failed: bool) -> dict[str, Any]:
    columns = {"AdvBench": "advbench/keyword_rate", "MT-Bench": "mt_bench/score"}
    row: dict[str, Any] = {
        "method": "fl",
        "aggregation": "fedavg",
        "num_seeds": 1,
        "num_failed": 1 if failed else 0,
        "num_not_run": 0,
        "metrics": {
            name: {"mean": MEASURES[m], "spread": None, "n": 1} for name, m in columns.items()
        },
        "unscored": {"mt_bench": 2},
        "seconds": 3.0,
    }
    failure = {"run": "fl-fedavg-seed1", "error": "ValueError: no data"}
    figures = {name: MEASURES[measure] for name, measure in columns.items()}
    cell = {"method": "fl", "aggregation": "fedavg", "seed": 0, "seconds": 3.0}
    return {
        "rows": [{**cell, "measures": MEASURES, "metrics": figures}],
        "summary": [row],
        "guards": [],
        "guard_seconds": {},
        "failed": [failure] if failed else [],
        "not_run": [],
        "columns": columns,
        "note": "random stand-ins: figures are not results",
        "command": [],
    }


@pytest.fixture
def grid_file(tmp_path: Path) -> Path:
    file = tmp_path / "table.yaml"
    rows = [{"method": "base"}, {"method": "fl", "aggregation": "fedavg"}]
    file.write_text(json.dumps({"seeds": [0, 1], "rows": rows}))
    return file


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the grid is given, in place of running it."""
    kept: dict[str, Any] = {"failed": False}

    def run_table(settings: TableSettings, **others: Any) -> dict[str, Any]:
        kept.update(others, settings=settings)
        found = results(failed=kept["failed"])
        (Path(settings.output) / "table.json").write_text(json.dumps(found))
        return found

    monkeypatch.setattr(table, "run_table", run_table)
    return kept


def run(grid_file: Path, output: Path, *arguments: str) -> int:
    return main(["table", "--config", str(grid_file), "--output", str(output), *arguments])


@pytest.mark.usefixtures("given")
def test_it_prints_the_table_and_writes_its_files(
    grid_file: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    assert run(grid_file, out) == 0
    printed = capsys.readouterr().out
    assert "fl fedavg     72.5" in printed
    assert "random stand-ins: figures are not results\n" in printed
    assert "fl fedavg: 2 items of mt_bench have no score\n" in printed
    assert len(printed.splitlines()) < 25
    assert (out / "table.png").exists()
    assert "<html" in (out / "report.html").read_text()
    assert "| fl fedavg | 72.5 | 2.7 |" in (out / "table.md").read_text()
    assert "figures are not results" in (out / "table.md").read_text()
    with (out / "table.csv").open() as file:
        assert next(csv.DictReader(file))["AdvBench"] == "72.5"


def test_a_failed_run_is_named_after_the_table_and_the_status_is_1(
    grid_file: Path, tmp_path: Path, given: dict[str, Any], capsys: Captured
) -> None:
    given["failed"] = True
    assert run(grid_file, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "fl fedavg: 1 of 2 failed" in captured.out
    assert "1 of 4 runs failed:\n  fl-fedavg-seed1: ValueError: no data" in captured.err
    assert "fl-fedavg-seed1: ValueError: no data" in (tmp_path / "out" / "table.md").read_text()


def test_files_of_an_earlier_table_do_not_stay_where_every_run_fails(
    grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def broken(name: str, arguments: list[str]) -> None:
        raise AssertionError("every run fails before its command")

    monkeypatch.setattr(table.training, "run", broken)
    settings = json.loads(grid_file.read_text())
    (tmp_path / "tiny.yaml").write_text("rounds: 1")
    files = {"configs": [str(tmp_path / "tiny.yaml")], "evaluation": [str(tmp_path / "tiny.yaml")]}
    grid_file.write_text(json.dumps(settings | files | {"num_workers": 1}))
    out = tmp_path / "out"
    out.mkdir()
    written = ("report.html", "table.csv", "table.md", "table.png", "table.json")
    for name in written:
        (out / name).write_text("100.0")
    monkeypatch.setattr(table_workers, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor())
    assert run(grid_file, out) == 1
    captured = capsys.readouterr()
    assert "4 of 4 runs failed" in captured.err
    assert "base-none-seed0: AssertionError: every run fails" in captured.out
    for name in written:
        assert b"100.0" not in (out / name).read_bytes()
    with (out / "table.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["failed", "failed"]


def test_two_tables_do_not_share_a_folder(
    grid_file: Path, tmp_path: Path, given: dict[str, Any], capsys: Captured
) -> None:
    (tmp_path / "out").mkdir()
    with only_here(tmp_path / "out", who="fedsafe table", option="--output"):
        assert run(grid_file, tmp_path / "out") == 1
    assert "another fedsafe table is at work in" in capsys.readouterr().err
    assert "settings" not in given


def test_the_table_is_given_its_settings_and_what_was_asked(
    grid_file: Path, tmp_path: Path, given: dict[str, Any], capsys: Captured
) -> None:
    settings = json.loads(grid_file.read_text())
    guard = {"name": "good", "configs": ["a.yaml"], "filter": "f.yaml", "test": "t.jsonl"}
    judge = {"class_path": "fedsafe.evaluation.local_judge.LocalJudge", "init_args": {"model": "m"}}
    changes = {"a.yaml": {"model": {"base": "tiny"}, "judge": judge}}
    settings |= {"guards": [guard], "changes": changes}
    grid_file.write_text(json.dumps(settings))
    given["failed"] = True
    assert run(grid_file, tmp_path / "out") == 1
    assert given["settings"].guards == [TableGuard("good", ("a.yaml",), "f.yaml", "t.jsonl")]
    assert given["settings"].changes == changes
    assert given["asked"][:3] == ["fedsafe", "table", "--config"]
    assert "1 of 5 runs failed" in capsys.readouterr().err


def test_some_rows_can_be_run_alone(grid_file: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    assert run(grid_file, tmp_path / "out", "--only", "fl") == 0
    assert given["settings"].only == "fl"
    assert len(given["settings"].rows) == 2


@pytest.mark.usefixtures("given")
def test_an_unknown_method_is_refused_with_those_that_there_are(
    grid_file: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run(grid_file, tmp_path / "out", "--only", "fl,fl_caj") == 1
    assert "only names fl_caj, which no row of the table is called; it has base, base-none" in (
        capsys.readouterr().err
    )


def test_a_row_with_an_unknown_setting_is_named(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "table.yaml"
    file.write_text(json.dumps({"seeds": [0], "rows": [{"method": "fl", "agregation": "fedavg"}]}))
    with pytest.raises(SystemExit) as caught:
        run(file, tmp_path / "out")
    assert caught.value.code == 2
    assert "agregation" in capsys.readouterr().err


@pytest.mark.parametrize(("has_gpu", "number"), [(True, 1), (False, 5)], ids=["gpu", "cpu"])
def test_runs_share_no_gpu_unless_told(
    grid_file: Path,
    tmp_path: Path,
    given: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    has_gpu: bool,
    number: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(table, "_num_cores", lambda: 5)
    assert run(grid_file, tmp_path / "out") == 0
    assert given["num_workers"] == number
    assert ("one run at a time on the GPU" in capsys.readouterr().out) == has_gpu
    assert run(grid_file, tmp_path / "out", "--num_workers", "3") == 0
    assert given["num_workers"] == 3


def test_cores_are_counted_where_the_system_has_no_affinity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert table._num_cores() >= 1
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert table._num_cores() == (os.cpu_count() or 1)


@pytest.mark.slow
def test_rows_are_trained_and_tested_by_the_commands_themselves(
    config: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "test.yaml").write_text(
        "data: {benchmarks: [{class_path: stub_benchmark.StubBenchmark, init_args: {num: 3}}]}"
    )
    settings = {
        "seeds": [0],
        "rows": [{"method": "base"}, {"method": "fl", "aggregation": "fedavg"}],
        "configs": [str(config)],
        "evaluation": [str(tmp_path / "test.yaml")],
        "num_workers": 1,
    }
    file, out = tmp_path / "table.yaml", tmp_path / "out"
    file.write_text(json.dumps(settings))
    assert run(file, out) == 0, capsys.readouterr()
    written = json.loads((out / "table.json").read_text())
    assert [row["method"] for row in written["rows"]] == ["base", "fl"]
    assert [row["metrics"] for row in written["rows"]] == [{"stub/rate": 1.0}] * 2
    assert written["rows"][1]["costs"]["visits"] == 4
    assert written["command"] == ["fedsafe", "table", "--config", str(file), "--output", str(out)]
    capsys.readouterr()
    assert run(file, out) == 0
    assert "of 2 runs 2 kept" in capsys.readouterr().out
