import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedsafe import table
from fedsafe.table import Row, run_table, summarise

FL = Row("fl", "fedavg", ("tiny.yaml",))
BENIGN = Row("fl_benign", "fedavg", ("tiny.yaml",), harm_share=0.0)

# Cells run in processes of their own, so what stands in for training and evaluation is a module
# that those processes import in its place.
STAND_INS = '''
import json, os, sys, time
from pathlib import Path
import yaml
from fedsafe import table

def write_world(output, *, harm_share, seed):
    (output / "base").mkdir(parents=True)

def load_trained(adapter, *, base):
    return json.loads((adapter / "trained.json").read_text()), None

def evaluate(model, tokenizer, *, seed):
    return {"refusal_rate": 50.0 + seed, "hhh_accuracy": 90.0, "help_rate": model["help"]}

table.write_world, table.load_trained, table.evaluate = write_world, load_trained, evaluate
table.load_base = table.load_tokenizer = lambda name: {"help": 10.0}

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
    rows = [table.Row("base"), table.Row("fl", "fedavg", ("tiny.yaml",))]
    done = table.run_table(rows, seeds=[0, 1], output=Path("out"), fit=stand_ins.fit, num_workers=1)
    sys.exit(len(done["failed"]))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    (tmp_path / "tiny.yaml").write_text("rounds: 1\n")
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
    assert done.keys() == {"rows", "summary", "failed"}
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


def cell_of(folder: Path, row: Row = FL, seed: int = 0) -> table.Cell:
    cell = table._cell(row, seed, folder / "out")
    (cell.world / "base").mkdir(parents=True, exist_ok=True)
    return cell


@pytest.fixture
def fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of each fit that a cell ran in this process."""
    calls: list[list[str]] = []
    monkeypatch.setattr(table, "load_trained", lambda *args, **kwargs: (None, None))
    monkeypatch.setattr(table, "evaluate", lambda *args, **kwargs: {"help_rate": 1.0})
    return calls


def run_cell(cell: table.Cell, fits: list[list[str]]) -> dict[str, Any]:
    def fit(arguments: list[str]) -> None:
        fits.append(arguments)
        (cell.folder / "fit").mkdir(parents=True)

    return table._run_cell(cell, fit)


def test_a_finished_cell_is_not_run_again(folder: Path, fits: list[list[str]]) -> None:
    first = run_cell(cell_of(folder), fits)
    assert run_cell(cell_of(folder), fits) == first
    assert len(fits) == 1


def test_a_failed_cell_does_not_lose_the_others_and_is_run_again(
    folder: Path, fits: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        table, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count)
    )
    for seed in (0, 1):
        cell_of(folder, seed=seed)
    broken = True

    def fit(arguments: list[str]) -> None:
        if broken and "seed0" in arguments[-1]:
            raise ValueError("every client of round 1 fails")
        fits.append(arguments)

    def run() -> dict[str, Any]:
        return run_table([FL], seeds=[0, 1], output=folder / "out", fit=fit, num_workers=1)

    done = run()
    assert done["failed"] == [
        {"run": "fl-fedavg-seed0", "error": "ValueError: every client of round 1 fails"}
    ]
    assert [row["seed"] for row in done["rows"]] == [1]
    assert written(folder) == done

    broken = False
    done = run()
    assert done["failed"] == []
    assert [row["seed"] for row in done["rows"]] == [0, 1]
    assert len(fits) == 2


def test_a_cell_whose_arguments_are_wrong_points_to_its_log() -> None:
    future: Future[dict[str, Any]] = Future()
    future.set_exception(SystemExit(2))
    assert table._outcome(future) == "its configuration is wrong, see log.txt"


def test_an_interrupt_in_a_cell_ends_the_table() -> None:
    future: Future[dict[str, Any]] = Future()
    future.set_exception(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        table._outcome(future)


def test_what_a_cell_prints_goes_to_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with table._output_to(tmp_path / "log.txt"):
        os.write(1, b"a line\n")
        os.write(2, b"a warning\n")
    os.write(1, b"after\n")
    assert (tmp_path / "log.txt").read_text() == "a line\na warning\n"
    assert capfd.readouterr() == ("after\n", "")


@pytest.mark.parametrize("change", ["config", "row", "version"])
def test_a_cell_of_other_settings_is_run_anew_and_not_resumed(
    folder: Path, fits: list[list[str]], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    run_cell(cell_of(folder), fits)
    row = FL
    if change == "config":
        (folder / "tiny.yaml").write_text("rounds: 2\n")
    elif change == "row":
        row = Row("fl", "fedavg", ("tiny.yaml",), harm_share=0.4)
    else:
        monkeypatch.setattr(table, "__version__", "99")
    run_cell(cell_of(folder, row), fits)
    assert len(fits) == 2
    assert "--ckpt_path" not in fits[1]


def test_a_half_done_cell_of_other_settings_is_not_resumed(
    folder: Path, fits: list[list[str]]
) -> None:
    cell = cell_of(folder)

    def killed(arguments: list[str]) -> None:
        (cell.folder / "fit").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table._run_cell(cell, killed)
    (folder / "tiny.yaml").write_text("rounds: 2\n")
    run_cell(cell, fits)
    assert "--ckpt_path" not in fits[0]


def test_rows_that_share_a_run_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several rows share a run: fl-fedavg-seed0; give each"):
        run_table([FL, FL], seeds=[0], output=tmp_path, fit=print, num_workers=1)


@pytest.mark.parametrize(("rows", "seeds"), [([], [0]), ([FL], [])])
def test_a_table_of_nothing_is_an_error(rows: list[Row], seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the table has \d rows and \d seeds; give one or more"):
        run_table(rows, seeds=seeds, output=tmp_path, fit=print, num_workers=1)


def test_worlds_are_shared_by_rows_of_the_same_harm(tmp_path: Path) -> None:
    scaffold = Row("fl", "scaffold", ("tiny.yaml",))
    worlds = [table._cell(row, 0, tmp_path).world for row in (FL, scaffold, BENIGN)]
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
