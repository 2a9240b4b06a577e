import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedsafe import table, table_runs
from fedsafe.table import run_table, summarise
from fedsafe.table_runs import Row, TableGuard

GOOD = TableGuard("good", ("guard.yaml",))
FL = Row("fl", "fedavg", ("tiny.yaml",))
BENIGN = Row("fl_benign", "fedavg", ("tiny.yaml",), harm_share=0.0)
FILTERED = Row("fl_filter", "fedavg", ("tiny.yaml",), guard="good")

# Cells run in processes of their own, so what stands in for training and evaluation is a module
# that those processes import in its place.
STAND_INS = '''
import json, os, sys, time
from pathlib import Path
import yaml
from fedsafe import table, table_runs

def write_world(output, *, harm_share, seed):
    (output / "base").mkdir(parents=True)
    (output / "helpful.jsonl").touch()

def load_trained(adapter, *, base):
    return json.loads((adapter / "trained.json").read_text()), None

def evaluate(model, tokenizer, *, seed):
    return {"refusal_rate": 50.0 + seed, "hhh_accuracy": 90.0, "help_rate": model["help"]}

table.write_world = write_world
table_runs.load_trained, table_runs.evaluate = load_trained, evaluate
table_runs.load_base = table_runs.load_tokenizer = lambda name: {"help": 10.0}

def fit(arguments):
    """Writes an adapter; every start of a cell is a line in starts.txt beside the table."""
    resumed = "--ckpt_path" in arguments
    overrides = Path(arguments[-3 if resumed else -1])
    run_dir = Path(yaml.safe_load(overrides.read_text())["run_dir"])
    root = run_dir.parents[2]
    with (root / "starts.txt").open("a") as file:
        file.write(f"{run_dir.parent.name} {'resumed' if resumed else 'new'}\\n")
    if os.environ.get("STOP_AT") == run_dir.parent.name:
        run_dir.mkdir(parents=True)
        time.sleep(600)
    (run_dir / "adapter").mkdir(parents=True, exist_ok=True)
    (run_dir / "adapter" / "trained.json").write_text('{"help": 80.0}')

if __name__ == "__main__":
    import stand_ins
    rows = [table_runs.Row("base"), table_runs.Row("fl", "fedavg", ("tiny.yaml",))]
    done = table.run_table(rows, seeds=[0, 1], output=Path("out"), fit=stand_ins.fit, num_workers=1)
    sys.exit(len(done["failed"]))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    (tmp_path / "tiny.yaml").write_text("rounds: 1\n")
    (tmp_path / "guard.yaml").write_text("rounds: 3\n")
    return tmp_path


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "stand_ins.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def starts(folder: Path) -> list[str]:
    file = folder / "out" / "starts.txt"
    return file.read_text().splitlines() if file.exists() else []


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "table.json").read_text())


@pytest.mark.slow
def test_a_killed_table_goes_on_where_it_stopped(folder: Path) -> None:
    process = start(folder, STOP_AT="fl-fedavg-seed1")
    deadline = time.monotonic() + 120
    while len(starts(folder)) < 2:
        assert time.monotonic() < deadline, process.communicate(timeout=1)
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "out" / "table.json").exists()

    output, _ = (again := start(folder)).communicate(timeout=120)
    assert again.returncode == 0, output
    assert starts(folder) == [
        "fl-fedavg-seed0 new",
        "fl-fedavg-seed1 new",
        "fl-fedavg-seed1 resumed",
    ]
    done = written(folder)
    assert done.keys() == {"rows", "summary", "guards", "failed"}
    cells = [(row["method"], row["aggregation"], row["seed"]) for row in done["rows"]]
    assert cells == [
        ("base", "none", 0),
        ("base", "none", 1),
        ("fl", "fedavg", 0),
        ("fl", "fedavg", 1),
    ]
    assert done["rows"][2]["metrics"] == {
        "refusal_rate": 50.0,
        "hhh_accuracy": 90.0,
        "help_rate": 80.0,
    }
    assert done["rows"][2].keys() == {"method", "aggregation", "seed", "metrics", "seconds"}


def write_world(output: Path, *, harm_share: float, seed: int) -> None:
    (output / "base").mkdir(parents=True, exist_ok=True)
    (output / "helpful.jsonl").write_text(f"{harm_share} {seed}")


@pytest.fixture
def outcomes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the runs find, by their folders, in place of running them; an error is raised.

    Runs go one at a time, in this process; `started` holds the names of their folders.
    """
    found: dict[str, Any] = {"started": []}

    def run(one: table_runs.Cell | table_runs.GuardRun, fit: object) -> Any:
        found["started"].append(one.folder.name)
        outcome = found.get(one.folder.name)
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(one, table_runs.GuardRun):
            return {"stages": [{"name": one.guard.name, "stage": "after"}], "seconds": 1.0}
        return outcome or result(one.row.method, one.seed, 1.0)

    monkeypatch.setattr(
        table, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(1)
    )
    monkeypatch.setattr(table, "run_cell", run)
    monkeypatch.setattr(table, "run_guard", run)
    monkeypatch.setattr(table, "write_world", write_world)
    return found


def tabulate(folder: Path, *rows: Row, seeds: Sequence[int] = (0, 1)) -> dict[str, Any]:
    output = folder / "out"
    output.mkdir(exist_ok=True)
    return run_table(rows, seeds=seeds, output=output, fit=print, num_workers=2, guards=[GOOD])


def test_a_failed_cell_does_not_lose_the_others(folder: Path, outcomes: dict[str, Any]) -> None:
    outcomes["fl-fedavg-seed0"] = ValueError("every client of round 1 fails")
    done = tabulate(folder, FL)
    assert done["failed"] == [
        {"run": "fl-fedavg-seed0", "error": "ValueError: every client of round 1 fails"}
    ]
    assert [row["seed"] for row in done["rows"]] == [1]
    assert written(folder) == done


def test_a_guard_is_trained_once_and_before_the_cells_that_need_it(
    folder: Path, outcomes: dict[str, Any]
) -> None:
    done = tabulate(folder, FILTERED, FL)
    assert outcomes["started"][0] == "guard-good"
    assert outcomes["started"].count("guard-good") == 1
    assert len(outcomes["started"]) == 5
    assert done["guards"] == [{"name": "good", "stage": "after"}]
    assert [(row["method"], row["seed"]) for row in done["rows"]] == [
        ("fl_filter", 0),
        ("fl_filter", 1),
        ("fl", 0),
        ("fl", 1),
    ]
    assert written(folder) == done


def test_a_failed_guard_fails_the_rows_that_need_it_and_no_others(
    folder: Path, outcomes: dict[str, Any]
) -> None:
    outcomes["guard-good"] = ValueError("no rows")
    done = tabulate(folder, FILTERED, FL)
    assert done["failed"] == [
        {"run": "guard-good", "error": "ValueError: no rows"},
        {"run": "fl_filter-fedavg-seed0", "error": "guard-good failed"},
        {"run": "fl_filter-fedavg-seed1", "error": "guard-good failed"},
    ]
    assert (done["guards"], [row["method"] for row in done["rows"]]) == ([], ["fl", "fl"])
    assert "fl_filter-fedavg-seed0" not in outcomes["started"]


def test_a_guard_that_nothing_names_is_measured_too(folder: Path, outcomes: dict[str, Any]) -> None:
    assert tabulate(folder, FL)["guards"] == [{"name": "good", "stage": "after"}]


@pytest.mark.parametrize(
    ("row", "guards", "message"),
    [
        pytest.param(
            FILTERED, [], "row fl_filter names the guard 'good', and .* are none; add it", id="none"
        ),
        pytest.param(
            FILTERED,
            [TableGuard("leaky", ())],
            "names the guard 'good', and the table's guards are leaky; add it to guards",
            id="other",
        ),
        pytest.param(
            Row("base", guard="good"), [GOOD], "row base trains nothing, so its guard", id="base"
        ),
        pytest.param(FL, [GOOD, GOOD], "guards are called good, good; give each", id="twice"),
    ],
)
def test_a_guard_that_is_missing_or_of_no_use_is_an_error(
    row: Row, guards: list[TableGuard], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_table([row], seeds=[0], output=tmp_path, fit=print, num_workers=1, guards=guards)


def test_a_cell_whose_arguments_are_wrong_points_to_its_log() -> None:
    future: Future[dict[str, Any]] = Future()
    future.set_exception(SystemExit(2))
    assert table._error(future) == "its configuration is wrong, see log.txt"


def test_an_interrupt_in_a_cell_ends_the_table() -> None:
    future: Future[dict[str, Any]] = Future()
    future.set_exception(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        table._error(future)


def test_rows_that_share_a_run_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several rows share a run: fl-fedavg-seed0; give each"):
        run_table([FL, FL], seeds=[0], output=tmp_path, fit=print, num_workers=1)


@pytest.mark.parametrize(("rows", "seeds"), [([], [0]), ([FL], [])])
def test_a_table_of_nothing_is_an_error(rows: list[Row], seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the table has \d rows and \d seeds; give one or more"):
        run_table(rows, seeds=seeds, output=tmp_path, fit=print, num_workers=1)


def test_a_world_of_an_earlier_version_is_written_anew(
    folder: Path, outcomes: dict[str, Any]
) -> None:
    world = table._cell(FL, 0, folder / "out", {}).world
    (world / "base").mkdir(parents=True)
    tabulate(folder, FL, seeds=[0])
    assert (world / "helpful.jsonl").read_text() == "0.2 0"
    (world / "helpful.jsonl").write_text("kept")
    tabulate(folder, FL, seeds=[0])
    assert (world / "helpful.jsonl").read_text() == "kept"


def test_worlds_are_shared_by_rows_of_the_same_harm(tmp_path: Path) -> None:
    scaffold = Row("fl", "scaffold", ("tiny.yaml",))
    worlds = [table._cell(row, 0, tmp_path, {}).world for row in (FL, scaffold, BENIGN)]
    assert worlds[0] == worlds[1] != worlds[2]


def result(method: str, seed: int, rate: float) -> dict[str, Any]:
    return {
        "method": method,
        "aggregation": "fedavg",
        "seed": seed,
        "metrics": {"help_rate": rate},
        "seconds": 2.0,
    }


def test_the_summary_is_the_mean_and_the_standard_deviation_over_seeds() -> None:
    first, second = summarise([result("fl", 0, 10), result("fl", 1, 14), result("other", 0, 5)])
    assert first["metrics"]["help_rate"]["mean"] == 12
    assert first["metrics"]["help_rate"]["spread"] == pytest.approx(8**0.5)
    assert (first["num_seeds"], first["seconds"]) == (2, 2.0)
    assert second["metrics"]["help_rate"] == {"mean": 5, "spread": 0}


def test_the_summary_has_the_filters_mean_counts_where_there_is_a_filter() -> None:
    filtered = [
        {**result("fl_filter", seed, 1), "filter": {"dropped": 10 + seed, "harm_left": 0}}
        for seed in (0, 1)
    ]
    first, second = summarise([*filtered, result("fl", 0, 1)])
    assert first["filter"] == {"dropped": 10.5, "harm_left": 0}
    assert "filter" not in second
