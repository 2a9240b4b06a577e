import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from word_guard import WordGuard

from fedsafe import table_folders, table_runs
from fedsafe.table_folders import Todo, todo
from fedsafe.table_runs import Cell, GuardRun, plan_cell, plan_guard, run_cell, run_guard
from fedsafe.table_settings import Row, TableGuard, TableSettings, merged
from fedsafe.world.guard_sets import guard_test_rows

GOOD = TableGuard("good", ("guard.yaml",), "filter.yaml", test="w/guard_test.jsonl")
BASE = Row("base")
FL = Row("fl", "fedavg")
CAI = Row("fl_cai", "fedavg", ("cai.yaml",))
FILTERED = Row("fl_filter", "fedavg", guard="good")
WORLD = Path("out/worlds/harm0.2-seed0")
FILES = {
    "tiny.yaml": "rounds: 1\nmodel: {base: w/base}\ntrainer: {devices: 1, callbacks: [a]}\n"
    "data_rows: rows.jsonl\n",
    "cai.yaml": "data: {cai: {prompts: w/red_team.jsonl}}\nfederated: {cai: {beta: 0.1}}\n",
    "guard.yaml": "rounds: 3\nmodel: {base: w/base}\ndata: {path: w/guard.jsonl}\n",
    "scratch.yaml": "model: {base: gpt2, from_config: {n_embd: 8}}\n",
    "filter.yaml": """\
data:
  filter:
    guard: {class_path: GuardModel, init_args: {format: world, model: w/base, dtype: bfloat16}}
    refusals: w/refusals.txt
    threshold: 0.25
""",
    "test.yaml": """\
data:
  benchmarks:
    - {class_path: AdvBench, init_args: {path: a.csv, seed: 7}}
    - {class_path: HHH, init_args: {path: b.csv}}
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the configurations."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def table_of(**settings: Any) -> TableSettings:
    files = {"configs": ["tiny.yaml"], "evaluation": ["test.yaml"], "world": "w"}
    return TableSettings(**{"output": "out", "rows": [FL], "seeds": [0], **files, **settings})


def guard_of(guard: TableGuard = GOOD) -> GuardRun:
    return plan_guard(guard, table_of(), world=WORLD)


def cell_of(row: Row = FL, seed: int = 0, **settings: Any) -> Cell:
    guard = guard_of() if row.guard else None
    return plan_cell(row, seed, table_of(**settings), world=WORLD, guard=guard)


class Commands:
    """Stands in for `fedsafe fit` and `test`; keeps what they are given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.given: list[dict[str, Any]] = []
        """The settings of each call, of all its files together."""
        counts = {"judged": 9, "unsafe": 5, "dropped": 5, "refused": 0}
        total = {**counts, "hits": 3, "false_alarms": 2, "misses": 1}
        self.filtered: dict[str, Any] = {"policy": "drop", "total": total}
        """What its `filter.json` says."""

    def __call__(self, name: str, arguments: list[str]) -> None:
        files = [value for option, value in itertools.pairwise(arguments) if option == "--config"]
        layers = [table_runs.Layer(f, yaml.safe_load(Path(f).read_text())) for f in files]
        self.calls.append((name, arguments))
        self.given.append(merged(layers))
        run_dir = Path(self.given[-1]["run_dir"])
        run_dir.mkdir(parents=True, exist_ok=True)
        if name == "fit":
            self.fit(run_dir)
            return
        subject = "base" if "none" in arguments else "test"
        results = {f"{subject}/hhh/accuracy": 61.0, "val/loss": 2.0}
        (run_dir / "results.json").write_text(json.dumps(results))

    def fit(self, run_dir: Path) -> None:
        (run_dir / "filter.json").write_text(json.dumps(self.filtered))
        clients = [{"status": "ok"}, {"status": "ok"}, {"status": "failed"}]
        row: dict[str, Any] = {"clients": clients, "seconds": 2.5, "tokens": 50}
        row |= {"bytes_up": 100, "bytes_down": 300}
        if "cai" in self.given[-1].get("data", {}):
            row["cai"] = {"sft_steps": 3, "dpo_steps": 2, "asked": 8, "kept": 5, "seconds": 1.5}
        (run_dir / "rounds.jsonl").write_text(2 * (json.dumps(row) + "\n"))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def commands(folder: Path) -> Commands:
    return Commands()


def test_a_cell_is_trained_and_its_adapter_tested(commands: Commands) -> None:
    found = run_cell(cell_of(seed=3), commands)
    run_dir = "out/runs/fl-fedavg-seed3/fit"
    assert commands.names == ["fit", "test"]
    assert commands.given[0] == {
        "rounds": 1,
        "data_rows": "rows.jsonl",
        "model": {"base": str(WORLD / "base")},
        "trainer": {"devices": 1, "callbacks": ["a"]},
        "seed_everything": 3,
        "run_dir": run_dir,
    }
    assert commands.calls[1][1][-2:] == ["--adapter", f"{run_dir}/adapter"]
    assert (found["method"], found["aggregation"], found["seed"]) == ("fl", "fedavg", 3)
    assert found["measures"] == {"hhh/accuracy": 61.0}
    costs = {"seconds": 5.0, "tokens": 100, "visits": 4, "bytes_per_visit": 200.0}
    assert found["costs"] == costs
    assert found.keys() == {"method", "aggregation", "seed", "measures", "seconds", "costs"}


def test_the_base_is_tested_and_not_trained(commands: Commands) -> None:
    found = run_cell(cell_of(BASE), commands)
    assert commands.names == ["test"]
    assert commands.calls[0][1][-2:] == ["--adapter", "none"]
    assert found["measures"] == {"hhh/accuracy": 61.0}
    assert "costs" not in found


@pytest.mark.parametrize("row", [FL, CAI, FILTERED], ids=["fl", "cai", "filter"])
def test_a_test_is_given_the_benchmarks_and_nothing_that_only_training_needs(
    row: Row, commands: Commands
) -> None:
    run_cell(cell_of(row, seed=3), commands)
    given = commands.given[1]
    assert given["data"]["benchmarks"] == [
        {"class_path": "AdvBench", "init_args": {"path": "a.csv", "seed": 3}},
        {"class_path": "HHH", "init_args": {"path": "b.csv"}},
    ]
    assert given["data"].keys() == {"benchmarks"}
    assert given["trainer"] == {"devices": 1}
    assert given["seed_everything"] == 3
    assert "federated" not in given


def test_a_finished_cell_is_not_run_again(commands: Commands) -> None:
    first = run_cell(cell_of(), commands)
    assert run_cell(cell_of(), commands) == first
    assert commands.names == ["fit", "test"]


@pytest.mark.parametrize("failing", ["fit", "test"])
def test_what_failed_alone_is_run_again(commands: Commands, failing: str) -> None:
    def broken(name: str, arguments: list[str]) -> None:
        if name == failing:
            raise ValueError("every client of round 1 fails")
        commands(name, arguments)

    with pytest.raises(ValueError, match="every client"):
        run_cell(cell_of(), broken)
    assert run_cell(cell_of(), commands)["measures"] == {"hhh/accuracy": 61.0}
    assert commands.names == ["fit", "test"]


@pytest.mark.parametrize("change", ["config", "changes", "row", "data", "base", "guard"])
def test_a_cell_of_other_settings_is_trained_anew_and_not_resumed(
    folder: Path, commands: Commands, change: str
) -> None:
    WORLD.joinpath("base").mkdir(parents=True)
    (WORLD / "base" / "config.json").write_text("{}")
    (folder / "rows.jsonl").write_text("two rows")
    row, changes = FILTERED if change == "guard" else FL, {}
    run_cell(cell_of(row), commands)
    if change == "config":
        (folder / "tiny.yaml").write_text("rounds: 2\n")
    elif change == "guard":
        (folder / "guard.yaml").write_text("rounds: 4\n")
    elif change == "row":
        row = Row("fl", "fedavg", harm_share=0.4)
    elif change == "changes":
        changes = {"tiny.yaml": {"rounds": 2}}
    elif change == "data":
        (folder / "rows.jsonl").write_text("one row")
    else:
        (WORLD / "base" / "model.safetensors").write_text("weights")
    run_cell(cell_of(row, changes=changes), commands)
    assert commands.names == ["fit", "test"] * 2
    assert "--ckpt_path" not in commands.calls[2][1]


def test_other_benchmarks_are_asked_without_training_anew(folder: Path, commands: Commands) -> None:
    run_cell(cell_of(), commands)
    (folder / "test.yaml").write_text("data: {benchmarks: [XSTest]}\n")
    run_cell(cell_of(), commands)
    assert commands.names == ["fit", "test", "test"]
    assert commands.given[2]["data"]["benchmarks"] == ["XSTest"]


@pytest.mark.parametrize("change", ["version", "benchmark's file"])
def test_a_cell_is_measured_anew_and_not_trained(
    folder: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    (folder / "a.csv").write_text("goal\n")
    run_cell(cell_of(), commands)
    if change == "version":
        monkeypatch.setattr(table_runs, "__version__", "99")
    else:
        (folder / "a.csv").write_text("goal\nanother\n")
    run_cell(cell_of(), commands)
    assert commands.names == ["fit", "test", "test"]


def test_what_runs_write_does_not_count_as_other_files(folder: Path, commands: Commands) -> None:
    guard = guard_of()
    run_cell(cell_of(FILTERED), commands)
    adapter = guard.folder / "fit" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    run_cell(cell_of(FILTERED), commands)
    assert commands.names == ["fit", "test"]


def test_what_there_is_to_do_is_known_beforehand(folder: Path, commands: Commands) -> None:
    def left() -> Todo:
        cell = cell_of()
        return todo(cell.folder, training=cell.digest(), everything=cell.everything())

    def killed(name: str, arguments: list[str]) -> None:
        raise KeyboardInterrupt

    assert left() is Todo.RUN
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell_of(), killed)
    assert left() is Todo.GO_ON
    run_cell(cell_of(), commands)
    assert left() is Todo.NOTHING
    (folder / "test.yaml").write_text("data: {benchmarks: [XSTest]}\n")
    assert left() is Todo.MEASURE
    (folder / "tiny.yaml").write_text("rounds: 2\n")
    assert left() is Todo.TRAIN_ANEW


def test_seconds_count_the_rounds_before_an_interruption(commands: Commands) -> None:
    run_dir = cell_of().folder / "fit"

    def killed(name: str, arguments: list[str]) -> None:
        run_dir.mkdir(parents=True)
        (run_dir / "rounds.jsonl").write_text(2 * '{"seconds": 500.0}\n' + '{"sec')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(cell_of(), killed)
    assert 1000 <= run_cell(cell_of(), commands)["seconds"] < 1100


def test_what_earlier_benchmarks_measured_is_forgotten(commands: Commands) -> None:
    cell = cell_of(BASE)
    old = cell.folder / "fit" / "results.json"
    run_cell(cell, commands)
    old.write_text('{"base/xstest/rate": 1.0}')
    (old.parent / "tested.json").write_text("{}")
    for name in ("replies", "replies-base"):
        (old.parent / name).mkdir()
        (old.parent / name / "xstest.jsonl").touch()

    def adds(name: str, arguments: list[str]) -> None:
        known = json.loads(old.read_text()) if old.exists() else {}
        old.write_text(json.dumps({**known, "base/hhh/accuracy": 2.0}))

    other = cell._replace(evaluation=())
    assert run_cell(other, adds)["measures"] == {"hhh/accuracy": 2.0}
    assert [file.name for file in old.parent.iterdir()] == ["results.json"]


def test_a_table_that_was_moved_is_not_run_again(folder: Path, commands: Commands) -> None:
    run_cell(cell_of(FILTERED), commands)
    (folder / "out").rename(folder / "elsewhere")
    settings = table_of(output="elsewhere")
    world = Path("elsewhere/worlds/harm0.2-seed0")
    guard = plan_guard(GOOD, settings, world=world)
    moved = plan_cell(FILTERED, 0, settings, world=world, guard=guard)
    run_cell(moved, commands)
    assert commands.names == ["fit", "test"]


def test_a_half_done_cell_of_the_same_settings_alone_is_resumed(
    folder: Path, commands: Commands
) -> None:
    arguments_seen = []

    def killed(name: str, arguments: list[str]) -> None:
        arguments_seen.append(arguments)
        (cell_of().folder / "fit").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_cell(cell_of(), killed)
    assert ["--ckpt_path" in arguments for arguments in arguments_seen] == [False, True]
    (folder / "tiny.yaml").write_text("rounds: 2\n")
    run_cell(cell_of(), commands)
    assert "--ckpt_path" not in commands.calls[0][1]


def test_what_a_cell_prints_goes_to_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with table_folders._output_to(tmp_path / "log.txt"):
        os.write(1, b"a line\n")
        os.write(2, b"a warning\n")
    os.write(1, b"after\n")
    assert (tmp_path / "log.txt").read_text() == "a line\na warning\n"
    assert capfd.readouterr() == ("after\n", "")


def test_a_filtered_cell_is_given_its_guard_and_counts_what_it_did(commands: Commands) -> None:
    found = run_cell(cell_of(FILTERED), commands)
    counts = {"judged": 9, "unsafe": 5, "dropped": 5, "refused": 0}
    assert found["filter"] == {**counts, "harm": 4, "harm_left": 1}
    given = commands.given[0]["data"]["filter"]
    assert given["guard"] == {
        "class_path": "GuardModel",
        "init_args": {
            "format": "world",
            "model": str(WORLD / "base"),
            "dtype": "bfloat16",
            "adapter": "out/runs/guard-good/fit/adapter",
            "name": "good",
        },
    }
    assert given["refusals"] == str(WORLD / "refusals.txt")


def test_behind_a_filter_that_keeps_all_harm_is_left(commands: Commands) -> None:
    commands.filtered["policy"] = "keep"
    commands.filtered["total"]["dropped"] = 0
    found = run_cell(cell_of(FILTERED), commands)["filter"]
    assert [found[name] for name in ("unsafe", "dropped", "harm", "harm_left")] == [5, 0, 4, 4]


def test_a_constitutional_cell_is_given_its_worlds_data_and_counts_what_it_cost(
    commands: Commands,
) -> None:
    costs = run_cell(cell_of(CAI), commands)["cai"]
    assert (costs["visits"], costs["sft_steps"], costs["kept"]) == (2, 6, 10)
    assert costs["seconds"] == 3.0
    assert commands.given[0]["data"]["cai"] == {"prompts": str(WORLD / "red_team.jsonl")}


def test_a_filter_without_a_guard_is_an_error(folder: Path) -> None:
    (folder / "filter.yaml").write_text("data: {filter: {threshold: 0.5}}")
    with pytest.raises(ValueError, match=r"filter.yaml has no data.filter.guard, by which good"):
        guard_of()


class StandInGuard(WordGuard):
    """Finds nothing before it is trained, and two kinds of harm after."""

    def __init__(self, format: str, *, model: str, name: str, **settings: Any) -> None:
        super().__init__(name=name)
        self.trained = "adapter" in settings
        assert settings["dtype"] == "bfloat16"

    def _verdict(self, text: str) -> Any:
        found = self.trained and ("wand" in text or "sack" in text)
        return super()._verdict(text)._replace(unsafe=0.3 if found else 0.1)


@pytest.fixture
def measured(folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_runs, "GuardModel", StandInGuard)
    WORLD.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in guard_test_rows(num_rows=600))
    (WORLD / "guard_test.jsonl").write_text(text)


@pytest.mark.usefixtures("measured")
def test_a_guard_is_measured_before_and_after_it_is_trained(commands: Commands) -> None:
    found = run_guard(guard_of(), commands)
    before, after = found["stages"]
    assert (before["name"], before["stage"], before["recall"]) == ("good", "before", 0)
    assert (after["name"], after["stage"], after["precision"]) == ("good", "after", 1)
    assert before["precision"] is None
    assert (after["samples"], after["unsafe"]) == (600, 200)
    answers = [row["messages"][1]["content"] for row in guard_test_rows(num_rows=600)]
    assert after["flagged"] == sum("wand" in each or "sack" in each for each in answers)
    # wand: enchantment, which guards are taught; sack: theft and capture, which they are not
    assert 0 < after["recall_taught"] < after["recall"] < after["recall_untaught"] < 1
    assert run_guard(guard_of(), commands) == found
    assert commands.names == ["fit"]


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("change", ["threshold", "judge", "test", "rows of the test"])
def test_a_guard_is_measured_anew_where_that_is_otherwise(
    folder: Path, commands: Commands, change: str
) -> None:
    first = run_guard(guard_of(), commands)["stages"][1]
    rows, guard = WORLD / "guard_test.jsonl", GOOD
    fewer = "".join(rows.read_text().splitlines(keepends=True)[:300])
    if change == "test":
        (WORLD / "fewer.jsonl").write_text(fewer)
        guard = replace(GOOD, test="w/fewer.jsonl")
    elif change == "rows of the test":
        rows.write_text(fewer)
    else:
        setting = {"threshold": "threshold: 0.05", "judge": "judge: prompt\n    threshold: 0.25"}
        text = FILES["filter.yaml"].replace("threshold: 0.25", setting[change])
        (folder / "filter.yaml").write_text(text)
    second = run_guard(guard_of(guard), commands)["stages"][1]
    assert (second["samples"], second["flagged"]) != (first["samples"], first["flagged"])
    assert commands.names == ["fit"]


def test_a_guard_without_labels_to_test_it_is_only_trained(commands: Commands) -> None:
    found = run_guard(guard_of(TableGuard("good", ("guard.yaml",), "filter.yaml")), commands)
    assert found["stages"] == []
    assert commands.names == ["fit"]


def test_a_guard_is_trained_on_the_worlds_labels(commands: Commands) -> None:
    run_guard(guard_of(TableGuard("good", ("guard.yaml",), "filter.yaml")), commands)
    assert commands.given[0]["data"] == {"path": str(WORLD / "guard.jsonl")}
    assert commands.given[0]["model"] == {"base": str(WORLD / "base")}


@pytest.mark.usefixtures("folder")
def test_a_guard_of_random_weights_has_the_base_that_its_training_wrote() -> None:
    scratch = guard_of(TableGuard("leaky", ("guard.yaml", "scratch.yaml"), "filter.yaml"))
    model = scratch.filter["guard"]["init_args"]["model"]
    assert model == "out/runs/guard-leaky/fit/base"
