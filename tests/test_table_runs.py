import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from word_guard import WordGuard

from fedsafe import table, table_runs
from fedsafe.table_runs import Cell, GuardRun, Row, TableGuard, run_cell, run_guard
from fedsafe.world.grammar import load_grammar
from fedsafe.world.guard_sets import guard_test_rows

GOOD = TableGuard("good", ("guard.yaml",))
FL = Row("fl", "fedavg", ("tiny.yaml",))
FILTERED = Row("fl_filter", "fedavg", ("tiny.yaml",), guard="good")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the configurations; nothing is loaded or evaluated."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("rounds: 1\n")
    (tmp_path / "guard.yaml").write_text("rounds: 3\n")
    monkeypatch.setattr(table_runs, "load_trained", lambda *args, **kwargs: (None, None))
    monkeypatch.setattr(table_runs, "evaluate", lambda *args, **kwargs: {"help_rate": 1.0})
    return tmp_path


def guard_of(folder: Path, guard: TableGuard = GOOD) -> GuardRun:
    run = table._guard_run(guard, FL, 0, folder / "out")
    run.world.mkdir(parents=True, exist_ok=True)
    return run


def cell_of(folder: Path, row: Row = FL) -> Cell:
    cell = table._cell(row, 0, folder / "out", {"good": guard_of(folder)})
    cell.world.mkdir(parents=True, exist_ok=True)
    return cell


class Fits:
    """Stands in for `fedsafe fit`; keeps its arguments."""

    def __init__(self, folder: Path) -> None:
        self.calls: list[list[str]] = []
        self._folder = folder
        counts = {"judged": 9, "unsafe": 5, "dropped": 5, "refused": 0}
        total = {**counts, "hits": 3, "false_alarms": 2, "misses": 1}
        self.filtered: dict[str, Any] = {"policy": "drop", "total": total}
        """What its `filter.json` says."""

    def __call__(self, arguments: list[str]) -> None:
        self.calls.append(arguments)
        run_dir = Path(self.overrides()["run_dir"])
        run_dir.mkdir(parents=True)
        (run_dir / "filter.json").write_text(json.dumps(self.filtered))
        visit = {"sft_steps": 3, "dpo_steps": 2, "asked": 8, "kept": 5, "seconds": 1.5}
        rows = [{"round": 1, "cai": visit}, {"round": 2, "cai": visit}]
        (run_dir / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def overrides(self, call: int = -1) -> dict[str, Any]:
        files = [part for part in self.calls[call] if part.endswith("overrides.yaml")]
        read: dict[str, Any] = yaml.safe_load(Path(files[-1]).read_text())
        return read


@pytest.fixture
def fits(folder: Path) -> Fits:
    return Fits(folder)


def test_a_finished_cell_is_not_run_again(folder: Path, fits: Fits) -> None:
    first = run_cell(cell_of(folder), fits)
    assert run_cell(cell_of(folder), fits) == first
    assert len(fits.calls) == 1


def test_a_failed_cell_is_run_again(folder: Path, fits: Fits) -> None:
    def failing(arguments: list[str]) -> None:
        raise ValueError("every client of round 1 fails")

    with pytest.raises(ValueError, match="every client"):
        run_cell(cell_of(folder), failing)
    assert run_cell(cell_of(folder), fits)["metrics"] == {"help_rate": 1.0}


@pytest.mark.parametrize("change", ["config", "row", "version", "guard"])
def test_a_cell_of_other_settings_is_run_anew_and_not_resumed(
    folder: Path, fits: Fits, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    row = FILTERED if change == "guard" else FL
    run_cell(cell_of(folder, row), fits)
    if change == "config":
        (folder / "tiny.yaml").write_text("rounds: 2\n")
    elif change == "guard":
        (folder / "guard.yaml").write_text("rounds: 4\n")
    elif change == "row":
        row = Row("fl", "fedavg", ("tiny.yaml",), harm_share=0.4)
    else:
        monkeypatch.setattr(table_runs, "__version__", "99")
    run_cell(cell_of(folder, row), fits)
    assert len(fits.calls) == 2
    assert "--ckpt_path" not in fits.calls[1]


def test_a_half_done_cell_of_the_same_settings_alone_is_resumed(folder: Path, fits: Fits) -> None:
    cell = cell_of(folder)
    arguments_seen = []

    def killed(arguments: list[str]) -> None:
        arguments_seen.append(arguments)
        (cell.folder / "fit").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_cell(cell, killed)
    assert ["--ckpt_path" in arguments for arguments in arguments_seen] == [False, True]
    (folder / "tiny.yaml").write_text("rounds: 2\n")
    run_cell(cell, fits)
    assert "--ckpt_path" not in fits.calls[0]


def test_what_a_cell_prints_goes_to_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with table_runs._output_to(tmp_path / "log.txt"):
        os.write(1, b"a line\n")
        os.write(2, b"a warning\n")
    os.write(1, b"after\n")
    assert (tmp_path / "log.txt").read_text() == "a line\na warning\n"
    assert capfd.readouterr() == ("after\n", "")


def test_a_filtered_cell_is_given_its_guard_and_counts_what_it_did(
    folder: Path, fits: Fits
) -> None:
    found = run_cell(cell_of(folder, FILTERED), fits)
    counts = {"judged": 9, "unsafe": 5, "dropped": 5, "refused": 0}
    assert found["filter"] == {**counts, "harm": 4, "harm_left": 1}
    guard, run = fits.overrides()["data"]["filter"]["guard"], guard_of(folder)
    assert guard["class_path"] == "fedsafe.safety.guard_model.GuardModel"
    assert guard["init_args"] == {
        "format": "world",
        "model": str(run.world / "base"),
        "adapter": str(run.folder / "fit" / "adapter"),
        "name": "good",
    }


def test_behind_a_filter_that_keeps_all_harm_is_left(folder: Path, fits: Fits) -> None:
    fits.filtered["policy"] = "keep"
    fits.filtered["total"]["dropped"] = 0
    found = run_cell(cell_of(folder, FILTERED), fits)["filter"]
    assert [found[name] for name in ("unsafe", "dropped", "harm", "harm_left")] == [5, 0, 4, 4]


def test_a_constitutional_cell_is_given_its_worlds_data_and_counts_what_it_cost(
    folder: Path, fits: Fits
) -> None:
    Path("cai.yaml").write_text("data: {cai: {batch_size: 8}}")
    cell = cell_of(folder, Row("fl_cai", "fedavg", ("tiny.yaml", "cai.yaml")))
    costs = run_cell(cell, fits)["cai"]
    assert (costs["visits"], costs["sft_steps"], costs["kept"]) == (2, 6, 10)
    assert costs["seconds"] == 3.0
    data = fits.overrides()["data"]["cai"]
    assert data["prompts"] == str(cell.world / "red_team.jsonl")
    assert data["helpful"] == str(cell.world / "helpful.jsonl")
    assert data["reviser"]["constitution"] == str(cell.world / "constitution.yaml")
    assert tuple(data["reviser"]["openings"]) == load_grammar().refusal_openings


def test_a_cell_without_constitutional_training_has_no_data_and_no_cost_of_it(
    folder: Path, fits: Fits
) -> None:
    assert "cai" not in run_cell(cell_of(folder), fits)
    assert "cai" not in fits.overrides()["data"]


def test_a_cell_without_a_guard_filters_nothing(folder: Path, fits: Fits) -> None:
    assert "filter" not in run_cell(cell_of(folder), fits)
    assert "filter" not in fits.overrides()["data"]


class StandInGuard(WordGuard):
    """Finds nothing before it is trained, and two kinds of harm after."""

    def __init__(self, format: str, *, model: str, name: str, **settings: Any) -> None:
        super().__init__(name=name)
        self.trained = "adapter" in settings
        self.model = model

    def _verdict(self, text: str) -> Any:
        found = self.trained and ("wand" in text or "sack" in text)
        return super()._verdict(text)._replace(unsafe=0.9 if found else 0.1)


@pytest.fixture
def measured(folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_runs, "GuardModel", StandInGuard)
    rows = guard_test_rows(num_rows=600)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (guard_of(folder).world / "guard_test.jsonl").write_text(text)


@pytest.mark.usefixtures("measured")
def test_a_guard_is_measured_before_and_after_it_is_trained(folder: Path, fits: Fits) -> None:
    found = run_guard(guard_of(folder), fits)
    before, after = found["stages"]
    assert (before["name"], before["stage"], before["recall"]) == ("good", "before", 0)
    assert (after["name"], after["stage"], after["precision"]) == ("good", "after", 1)
    assert before["precision"] is None
    assert (after["samples"], after["unsafe"]) == (600, 200)
    answers = [row["messages"][1]["content"] for row in guard_test_rows(num_rows=600)]
    assert after["flagged"] == sum("wand" in each or "sack" in each for each in answers)
    # wand: enchantment, which guards are taught; sack: theft and capture, which they are not
    assert 0 < after["recall_taught"] < after["recall"] < after["recall_untaught"] < 1
    assert run_guard(guard_of(folder), fits) == found
    assert len(fits.calls) == 1


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("from_scratch", [False, True], ids=["from_base", "from_scratch"])
def test_a_guard_is_trained_on_the_worlds_labels_from_its_base_or_from_random_weights(
    folder: Path, fits: Fits, from_scratch: bool
) -> None:
    run = guard_of(folder, TableGuard("good", ("guard.yaml",), from_scratch))
    run_guard(run, fits)
    given = fits.overrides()
    base = str(run.world / "base")
    assert given["data"] == {"path": str(run.world / "guard.jsonl"), "tokenizer": base}
    assert given.get("model") == (None if from_scratch else {"base": base})
    assert str(run.base) == (str(run.folder / "fit" / "base") if from_scratch else base)
