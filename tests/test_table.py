import io
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import stub_benchmark
from rich.console import Console
from warm import Started, end, start_python

from fedsafe import table as grid
from fedsafe import table_runs, table_workers
from fedsafe.table import run_table
from fedsafe.table_settings import Row, TableGuard, TableSettings

OUTPUT = "output.txt"
GOOD = TableGuard("good", ("guard.yaml",), "filter.yaml")
BASE = Row("base")
FL = Row("fl", "fedavg")
SCAFFOLD = Row("fl", "scaffold", ("scaffold.yaml",))
BENIGN = Row("fl_benign", "fedavg", harm_share=0.0)
FILTERED = Row("fl_filter", "fedavg", guard="good")
FILES = {
    "tiny.yaml": "rounds: 1",
    "guard.yaml": "model: {base: runs/world/base}",
    "filter.yaml": "data: {filter: {guard: {class_path: GuardModel}}}",
    "scaffold.yaml": "federated: {client_drift: Scaffold}",
    "test.yaml": "data: {benchmarks: [{class_path: stub_benchmark.StubBenchmark}]}",
}

# Cells run in processes of their own, so what stands in for training and testing is a module that
# those processes import in its place.
STAND_INS = '''
import json, os, sys, time
from pathlib import Path
import yaml
from fedsafe.table import run_table
from fedsafe.table_settings import Row, TableSettings

def command(name, arguments):
    """Trains and tests; every start is a line in starts.txt beside the runs."""
    files = [part for part in arguments if part.endswith("-run.yaml")]
    run_dir = Path(yaml.safe_load(Path(files[-1]).read_text())["run_dir"])
    cell, resumed = run_dir.parent.name, "resumed" if "--ckpt_path" in arguments else "new"
    starts = run_dir.parents[2] / "starts.txt"
    with starts.open("a") as file:
        file.write(f"{name} {cell} {resumed} {os.getpid()}\\n")
    run_dir.mkdir(parents=True, exist_ok=True)
    if os.environ.get("STOP_AT") == f"{name} {cell}":
        time.sleep(600)
    if os.environ.get("DIE_AT") == f"{name} {cell}":
        os._exit(1)
    if os.environ.get("SLOW_AT") == f"{name} {cell}":
        while not any("fl-fedavg" in line for line in starts.read_text().splitlines()):
            time.sleep(0.05)
    subject = "base" if "none" in arguments else "test"
    (run_dir / "results.json").write_text(json.dumps({f"{subject}/advbench/rate": 50.0}))

if __name__ == "__main__":
    import stand_ins
    rows = [Row("base"), Row("fl", "fedavg")]
    table = TableSettings(
        "out", rows, [0, 1], configs=["tiny.yaml"], evaluation=["test.yaml"]
    )
    number = 2 if "SLOW_AT" in os.environ else 1
    done = run_table(table, command=stand_ins.command, num_workers=number, asked=["fedsafe"])
    sys.exit(len(done["failed"]))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@contextmanager
def started(folder: Path, **environment: str) -> Iterator[Started]:
    """A table in a process of its own, which writes to `OUTPUT` and leaves with this."""
    (folder / "out").mkdir(exist_ok=True)
    paths = [str(folder), str(Path(stub_benchmark.__file__).parent)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    process = start_python(folder / "stand_ins.py", output=folder / OUTPUT, env=env)
    try:
        yield process
    finally:
        end([process])


def starts(folder: Path) -> list[str]:
    file = folder / "out" / "starts.txt"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(folder: Path, line: str) -> int:
    """The number of the process that begins what the line names."""
    deadline = time.monotonic() + 120
    while not (found := [each for each in starts(folder) if each.startswith(line)]):
        assert time.monotonic() < deadline, (folder / OUTPUT).read_text()
        time.sleep(0.05)
    return int(found[0].split()[-1])


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "table.json").read_text())


@pytest.mark.slow
def test_a_killed_table_goes_on_where_it_stopped_and_leaves_no_process(folder: Path) -> None:
    with started(folder, STOP_AT="test fl-fedavg-seed1") as process:
        worker = psutil.Process(wait_for(folder, "test fl-fedavg-seed1"))
        process.terminate()
        assert process.wait() == -signal.SIGTERM
    worker.wait(timeout=20)
    part = written(folder)
    assert [row["num_seeds"] for row in part["summary"]] == [2, 1]
    assert part["not_run"] == ["fl-fedavg-seed1"]

    with started(folder) as again:
        assert again.wait(timeout=120) == 0, (folder / OUTPUT).read_text()
    assert [line.rpartition(" ")[0] for line in starts(folder)] == [
        "test base-none-seed0 new",
        "test base-none-seed1 new",
        "fit fl-fedavg-seed0 new",
        "test fl-fedavg-seed0 new",
        "fit fl-fedavg-seed1 new",
        "test fl-fedavg-seed1 new",
        "test fl-fedavg-seed1 new",
    ]
    done = written(folder)
    parts = {"rows", "summary", "guards", "guard_seconds", "failed", "not_run"}
    assert done.keys() == parts | {"columns", "note", "command"}
    cells = [(row["method"], row["aggregation"], row["seed"]) for row in done["rows"]]
    assert cells == [
        ("base", "none", 0),
        ("base", "none", 1),
        ("fl", "fedavg", 0),
        ("fl", "fedavg", 1),
    ]
    assert all(row["metrics"] == {"advbench/rate": 50.0} for row in done["rows"])
    assert done["command"] == ["fedsafe"]


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_run_along(folder: Path) -> None:
    """The other worker waits, in the midst of its run, until that one is dead."""
    blocked = {"DIE_AT": "test base-none-seed1", "SLOW_AT": "test base-none-seed0"}
    with started(folder, **blocked) as process:
        assert process.wait(timeout=120) == 1, (folder / OUTPUT).read_text()
    done = written(folder)
    assert done["failed"] == [{"run": "base-none-seed1", "error": table_workers.DIED}]
    assert [row["method"] for row in done["rows"]] == ["base", "fl", "fl"]
    assert len([line for line in starts(folder) if "base-none-seed0" in line]) == 1


def write_world(output: Path, *, harm_share: float, seed: int) -> None:
    (output / "base").mkdir(parents=True, exist_ok=True)
    (output / "helpful.jsonl").write_text(f"{harm_share} {seed}")


@pytest.fixture
def outcomes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the runs find, by their folders, in place of running them; an error is raised.

    Runs go one at a time, in this process; `started` holds the names of their folders.
    """
    found: dict[str, Any] = {"started": []}

    def run(one: table_runs.Cell | table_runs.GuardRun, command: object) -> Any:
        found["started"].append(one.folder.name)
        outcome = found.get(one.folder.name)
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(one, table_runs.GuardRun):
            return {"stages": [{"name": one.name, "stage": "after"}], "seconds": 1.0}
        return result(one.row, one.seed)

    one = ThreadPoolExecutor(1)
    monkeypatch.setattr(one, "shutdown", lambda: None)
    monkeypatch.setattr(table_workers, "ProcessPoolExecutor", lambda count, **_: one)
    monkeypatch.setattr(table_workers, "run_cell", run)
    monkeypatch.setattr(table_workers, "run_guard", run)
    monkeypatch.setattr(grid, "write_world", write_world)
    return found


def result(row: Row, seed: int) -> dict[str, Any]:
    about = {"method": row.method, "aggregation": row.aggregation, "seed": seed}
    return {**about, "measures": {"advbench/rate": 1.0, "hhh/accuracy": 2.0}, "seconds": 2.0}


def tabulate(*rows: Row, seeds: Sequence[int] = (0, 1), **settings: Any) -> dict[str, Any]:
    Path("out").mkdir(exist_ok=True)
    table = TableSettings(
        "out",
        list(rows),
        list(seeds),
        configs=["tiny.yaml"],
        evaluation=["test.yaml"],
        guards=[GOOD],
        **settings,
    )
    return run_table(table, command=lambda name, arguments: None, num_workers=2)


def test_a_failed_cell_does_not_lose_the_others(folder: Path, outcomes: dict[str, Any]) -> None:
    outcomes["fl-fedavg-seed0"] = ValueError("every client of round 1 fails")
    done = tabulate(FL)
    assert done["failed"] == [
        {"run": "fl-fedavg-seed0", "error": "ValueError: every client of round 1 fails"}
    ]
    assert [row["seed"] for row in done["rows"]] == [1]
    assert written(folder) == done


@pytest.mark.usefixtures("outcomes", "folder")
def test_the_columns_say_what_is_shown() -> None:
    done = tabulate(FL, seeds=[0], columns={"HHH": "hhh/accuracy", "none": "hhh/x"}, note="a note")
    assert done["rows"][0]["metrics"] == {"HHH": 2.0, "none": None}
    assert done["summary"][0]["metrics"]["HHH"]["mean"] == 2.0
    assert (done["columns"], done["note"]) == ({"HHH": "hhh/accuracy", "none": "hhh/x"}, "a note")
    assert list(tabulate(FL, seeds=[0])["columns"]) == ["advbench/rate", "hhh/accuracy"]


def test_a_guard_is_trained_once_and_before_the_cells_that_need_it(
    folder: Path, outcomes: dict[str, Any]
) -> None:
    done = tabulate(FILTERED, FL)
    assert outcomes["started"][0] == "guard-good"
    assert outcomes["started"].count("guard-good") == 1
    assert len(outcomes["started"]) == 5
    assert done["guards"] == [{"name": "good", "stage": "after"}]
    assert done["guard_seconds"] == {"good": 1.0}
    assert [(row["method"], row["seed"]) for row in done["rows"]] == [
        ("fl_filter", 0),
        ("fl_filter", 1),
        ("fl", 0),
        ("fl", 1),
    ]
    assert written(folder) == done


@pytest.mark.usefixtures("folder")
def test_a_failed_guard_fails_the_rows_that_need_it_and_no_others(outcomes: dict[str, Any]) -> None:
    outcomes["guard-good"] = ValueError("no rows")
    done = tabulate(FILTERED, FL)
    assert done["failed"] == [
        {"run": "guard-good", "error": "ValueError: no rows"},
        {"run": "fl_filter-fedavg-seed0", "error": "guard-good failed"},
        {"run": "fl_filter-fedavg-seed1", "error": "guard-good failed"},
    ]
    assert (done["guards"], [row["method"] for row in done["rows"]]) == ([], ["fl", "fl"])
    assert [row["num_failed"] for row in done["summary"]] == [2, 0]
    assert "fl_filter-fedavg-seed0" not in outcomes["started"]


@pytest.mark.usefixtures("outcomes", "folder")
def test_a_guard_that_nothing_names_is_measured_too() -> None:
    assert tabulate(FL)["guards"] == [{"name": "good", "stage": "after"}]


@pytest.mark.usefixtures("outcomes")
def test_a_missing_file_is_an_error_before_anything_is_run(folder: Path) -> None:
    (folder / "test.yaml").unlink()
    with pytest.raises(ValueError, match=r"there is no configuration test.yaml"):
        tabulate(FL, world="runs/world")
    assert list((folder / "out").iterdir()) == []


@pytest.mark.usefixtures("outcomes")
def test_worlds_are_shared_by_rows_of_the_same_harm(folder: Path) -> None:
    tabulate(BASE, FL, SCAFFOLD, BENIGN, seeds=[3], world="runs/world")
    worlds = folder / "out" / "worlds"
    assert sorted(each.name for each in worlds.iterdir()) == ["harm0-seed3", "harm0.2-seed3"]
    assert (worlds / "harm0-seed3" / "helpful.jsonl").read_text() == "0.0 3"


@pytest.mark.usefixtures("outcomes")
def test_a_world_of_an_earlier_version_is_written_anew(folder: Path) -> None:
    world = folder / "out" / "worlds" / "harm0.2-seed0"
    (world / "base").mkdir(parents=True)
    tabulate(FL, seeds=[0], world="runs/world")
    assert (world / "helpful.jsonl").read_text() == "0.2 0"
    (world / "helpful.jsonl").write_text("kept")
    tabulate(FL, seeds=[0], world="runs/world")
    assert (world / "helpful.jsonl").read_text() == "kept"


@pytest.mark.usefixtures("outcomes")
def test_a_table_without_a_world_makes_none(folder: Path) -> None:
    tabulate(FL)
    assert [each.name for each in (folder / "out").iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SystemExit(2), "its configuration is wrong, see log.txt"),
        (BrokenProcessPool(), "its process ended without a word"),
        (ValueError("no rows"), "ValueError: no rows"),
    ],
    ids=["arguments", "killed", "error"],
)
def test_an_error_says_what_went_wrong(error: BaseException, message: str) -> None:
    future: Future[dict[str, Any]] = Future()
    future.set_exception(error)
    assert str(table_workers.error_of(future)).startswith(message)


def test_an_interrupt_in_a_cell_ends_the_table() -> None:
    future: Future[dict[str, Any]] = Future()
    future.set_exception(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        table_workers.error_of(future)


def keep(run: table_runs.Run, found: dict[str, Any]) -> None:
    """Let a run have been run before, with this result."""
    run.folder.mkdir(parents=True)
    text = json.dumps({**found, "digest": run.everything()})
    (run.folder / "result.json").write_text(text)


def test_rows_that_are_not_asked_for_keep_their_figures(
    folder: Path, outcomes: dict[str, Any]
) -> None:
    rows = [BASE, FL, FILTERED, SCAFFOLD]
    table = TableSettings(
        "out", rows, [0, 1], ["tiny.yaml"], ["test.yaml"], guards=[GOOD], world="w", only="base"
    )
    plan = grid._plan(table)
    by_name = {run.folder.name: run for run in plan.runs}
    keep(by_name["guard-good"], {"stages": [{"name": "good"}], "seconds": 3.0})
    keep(by_name["fl-fedavg-seed0"], result(FL, 0))
    keep(by_name["fl-fedavg-seed1"], result(FL, 1))
    keep(by_name["fl_filter-fedavg-seed1"], result(FILTERED, 1))
    done = run_table(table, command=lambda name, arguments: None, num_workers=1)
    assert outcomes["started"] == ["base-none-seed0", "base-none-seed1"]
    assert [row["num_seeds"] for row in done["summary"]] == [2, 2, 1, 0]
    assert [row["num_not_run"] for row in done["summary"]] == [0, 0, 1, 2]
    assert (done["guards"], done["failed"]) == ([{"name": "good"}], [])
    scaffold = ["fl-scaffold-seed0", "fl-scaffold-seed1"]
    assert done["not_run"] == ["fl_filter-fedavg-seed0", *scaffold]


def test_the_result_of_other_settings_is_not_shown(folder: Path, outcomes: dict[str, Any]) -> None:
    table = TableSettings("out", [BASE, FL], [0], ["tiny.yaml"], ["test.yaml"], only="base")
    keep(grid._plan(table).cells[1], result(FL, 0))
    (folder / "tiny.yaml").write_text("rounds: 9")
    done = run_table(table, command=lambda name, arguments: None, num_workers=1)
    assert done["not_run"] == ["fl-fedavg-seed0"]


def test_a_guard_is_the_same_whatever_rows_are_asked_for(
    folder: Path, outcomes: dict[str, Any]
) -> None:
    rows = [BENIGN, FILTERED]
    table = TableSettings(
        "out", rows, [0], ["tiny.yaml"], ["test.yaml"], guards=[GOOD], world="runs/world"
    )
    [guard] = grid._plan(table).guards
    [same] = grid._plan(replace(table, only="fl_filter")).guards
    assert same == guard
    assert guard.layers[0].settings["model"]["base"] == "out/worlds/harm0-seed0/base"


def test_what_is_to_be_done_is_told_and_failures_as_they_come(
    folder: Path, outcomes: dict[str, Any]
) -> None:
    table = TableSettings("out", [BASE, FL], [0, 1], ["tiny.yaml"], ["test.yaml"])
    plan = grid._plan(table)
    keep(plan.cells[0], result(BASE, 0))
    (plan.cells[1].folder).mkdir()
    (plan.cells[1].folder / "settings").write_text("others")
    outcomes["fl-fedavg-seed0"] = ValueError("no [rows]")
    console = Console(file=io.StringIO(), width=80)
    run_table(table, command=lambda name, arguments: None, num_workers=1, console=console)
    told = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert told[0] == (
        "of 4 runs 1 kept, 1 to be run anew, as their settings or files are others than before, "
        "2 to be run"
    )
    assert "fl-fedavg-seed0: ValueError: no [rows]" in told


@pytest.mark.usefixtures("outcomes")
def test_a_row_of_another_aggregation_than_it_is_called_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="row fl-scaffold is called scaffold"):
        tabulate(FL, Row("fl", "scaffold"))
    assert list((folder / "out").iterdir()) == []


def test_a_benchmark_that_cannot_be_read_is_an_error_before_anything_is_run(
    folder: Path, outcomes: dict[str, Any]
) -> None:
    text = "{class_path: fedsafe.evaluation.advbench.AdvBench, init_args: {path: nowhere.csv}}"
    (folder / "test.yaml").write_text(f"data: {{benchmarks: [{text}]}}")
    with pytest.raises(ValueError, match=r"nowhere\.csv"):
        tabulate(FL)
    assert outcomes["started"] == []
