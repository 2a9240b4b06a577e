import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from warm import run_python

from fedsafe.cli import main
from fedsafe.safety.score_cache import CHUNK_SIZE

Captured = pytest.CaptureFixture[str]

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in its own folder, with its own cache of verdicts and the stub guards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSAFE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(HERE)
    return tmp_path


def command(source: str, *arguments: str, output: str = "kept.jsonl") -> list[str]:
    guard = ["--guard", "stub_guards.WordGuard"]
    return ["filter", "--input", source, "--output", output, *guard, *arguments]


def filtered(source: str, *arguments: str) -> int:
    return main(command(source, *arguments))


def write(name: str, *rows: dict[str, Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def summary(name: str = "kept.summary.json") -> dict[str, Any]:
    return json.loads(Path(name).read_text())


def row(prompt: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": "as you say", **columns}


SAFE = row("feed the cat", note={"a": [1, 2.5]}, id=7, client="ada")
UNSAFE = row("feed the dragon", note=None, id=8, client="bob")
BAD = {"prompt": "no answer"}


def test_unsafe_rows_are_rejected_and_the_others_kept_as_they_were(capsys: Captured) -> None:
    assert filtered(write("in.jsonl", SAFE, UNSAFE, BAD)) == 0
    assert lines("kept.jsonl") == [SAFE]
    verdict = {"unsafe": 0.9, "categories": ["S1"], "guard": "word-dragon"}
    assert lines("kept.rejected.jsonl") == [{**UNSAFE, "verdict": verdict}]
    [bad] = lines("kept.bad.jsonl")
    assert (bad["source"], bad["row"]) == ("in.jsonl", 3)
    assert "has no `response`" in bad["reason"]
    found = summary()
    assert [found[name] for name in ("rows", "kept", "rejected", "bad")] == [3, 1, 1, 1]
    assert found["categories"] == {"S1": 1}
    assert found["labelled"] is None
    out = " ".join(capsys.readouterr().out.split())
    assert "unsafe │ 1 (S1 1)" in out
    assert "wrote kept.rejected.jsonl, kept.filter.jsonl, kept.bad.jsonl" in out


def test_the_filter_file_holds_verdicts_and_no_text() -> None:
    filtered(write("in.jsonl", SAFE, {**UNSAFE, "prompt": "a long dragon"}))
    common = {"source": "in.jsonl", "guard": "word-dragon"}
    assert lines("kept.filter.jsonl") == [
        {**common, "client": "ada", "row": 1, "unsafe": 0.1, "categories": [], "action": "kept"},
        {
            **common,
            "client": "bob",
            "row": 2,
            "unsafe": 0.9,
            "categories": ["S1"],
            "shortened": True,
            "action": "dropped",
        },
    ]
    assert summary()["shortened"] == 1


def test_a_refusal_takes_the_place_of_an_unsafe_answer() -> None:
    Path("refusals.txt").write_text("I would rather not.\n")
    rows = [SAFE, {**UNSAFE, "label": "unsafe"}]
    refuse = ("--policy", "refuse", "--refusals", "refusals.txt", "--max_unsafe_share", "1")
    assert filtered(write("in.jsonl", *rows), *refuse) == 0
    refused = {**UNSAFE, "response": "I would rather not.", "label": "safe"}
    assert lines("kept.jsonl") == [SAFE, refused]
    assert lines("kept.rejected.jsonl") == []
    assert [each["action"] for each in lines("kept.filter.jsonl")] == ["kept", "refused"]
    found = summary()
    assert (found["kept"], found["rejected"], found["refused"]) == (2, 0, 1)


def test_policy_keep_only_writes_verdicts_down() -> None:
    assert filtered(write("in.jsonl", UNSAFE, UNSAFE), "--policy", "keep") == 0
    assert lines("kept.jsonl") == [UNSAFE, UNSAFE]
    assert summary()["unsafe"] == 2


def test_settings_come_from_a_configuration_too() -> None:
    config = {"guard": {"class_path": "stub_guards.WordGuard", "init_args": {"word": "cat"}}}
    Path("guard.yaml").write_text(json.dumps({**config, "threshold": 0.95}))
    source = write("in.jsonl", SAFE, UNSAFE)
    given = ["--config", "guard.yaml", "--input", source]
    assert main(["filter", *given, "--output", "a.jsonl"]) == 0
    assert main(["filter", *given, "--output", "b.jsonl", "--threshold", "0.9"]) == 0
    assert lines("a.jsonl") == [SAFE, UNSAFE]
    assert lines("b.jsonl") == [UNSAFE]


def test_the_same_configuration_filters_the_clients_of_a_fit(
    config: Path, capsys: Captured
) -> None:
    guard = {"class_path": "stub_guards.WordGuard", "init_args": {"word": "cat"}}
    settings = {"guard": guard, "policy": "refuse", "judge": "prompt", "threshold": 0.7}
    Path("filter.yaml").write_text(json.dumps(settings))
    source = write("in.jsonl", SAFE, UNSAFE)
    given = ["--config", "filter.yaml", "--input", source, "--output", "kept.jsonl"]
    assert main(["filter", *given]) == 0
    assert summary()["refused"] == 1
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--data.filter", "filter.yaml", "--print_config"])
    parsed = yaml.safe_load(capsys.readouterr().out)["data"]["filter"]
    assert parsed["guard"]["init_args"]["word"] == "cat"
    assert {name: parsed[name] for name in ("policy", "judge", "threshold")} == {
        name: settings[name] for name in ("policy", "judge", "threshold")
    }


def test_the_guard_is_shown_what_is_judged() -> None:
    source = write("in.jsonl", row("a dragon"), row("a cat"))
    assert filtered(source, "--judge", "response") == 0
    assert summary()["unsafe"] == 0


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_every_file_type_is_read(end: str) -> None:
    rows = [row("feed the cat", id="7"), row("feed the dragon", id="8")]
    source = f"in{end}"
    if end == ".jsonl.gz":
        Path(source).write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    elif end == ".csv":
        table = ["prompt,response,id", *(",".join(each.values()) for each in rows)]
        Path(source).write_text("\n".join(table))
    elif end == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    elif end == ".json":
        Path(source).write_text(json.dumps(rows))
    else:
        write(source, *rows)
    assert filtered(source) == 0
    assert lines("kept.jsonl") == [rows[0]]
    assert lines("kept.rejected.jsonl")[0]["id"] == "8"


def test_where_rows_are_labelled_the_guard_is_measured(capsys: Captured) -> None:
    labelled = [
        {**SAFE, "label": "safe"},
        {**UNSAFE, "label": "unsafe"},
        {**UNSAFE, "label": "safe"},
        row("another cat", label="unsafe"),
        row("a third cat"),
    ]
    assert filtered(write("in.jsonl", *labelled)) == 0
    found = summary()["labelled"]
    assert (found["samples"], found["precision"], found["recall"]) == (4, 0.5, 0.5)
    assert "precision 50.0, recall 50.0" in " ".join(capsys.readouterr().out.split())


def test_without_bad_rows_there_is_no_file_of_them() -> None:
    write("kept.bad.jsonl", BAD)
    assert filtered(write("in.jsonl", SAFE, UNSAFE), "--overwrite", "true") == 0
    assert not Path("kept.bad.jsonl").exists()


def test_bad_rows_can_be_an_error_before_anything_is_judged(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGED", "judged")
    assert filtered(write("in.jsonl", SAFE, BAD), "--on_bad_row", "error") == 1
    assert "1 of 2 rows cannot be used:\n  in.jsonl, line 2: has no" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl"]


def test_another_threshold_judges_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGED", "judged")
    source = write("in.jsonl", SAFE, UNSAFE)
    filtered(source)
    assert filtered(source, "--threshold", "0.95", "--overwrite", "true") == 0
    assert lines("kept.jsonl") == [SAFE, UNSAFE]
    assert Path("judged").read_text() == ".."


def test_files_that_are_there_are_not_overwritten_unasked(capsys: Captured) -> None:
    source = write("in.jsonl", SAFE, UNSAFE)
    Path("kept.jsonl").write_text("mine")
    assert filtered(source) == 1
    error = capsys.readouterr().err
    assert "kept.jsonl would be overwritten; give another --output, or --overwrite true" in error
    assert Path("kept.jsonl").read_text() == "mine"
    assert filtered(source, "--overwrite", "true") == 0
    assert lines("kept.jsonl") == [SAFE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "in.jsonl"], "in.jsonl is read and would be written too"),
        (["--output", "kept.csv"], "kept.csv would hold JSON lines; give a name that ends with"),
        (["--rejected", "no.txt"], "no.txt would hold JSON lines; give a name that ends with"),
        (["--rejected", "kept.jsonl"], "kept.jsonl is another output too; give --rejected"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl is missing; give the path"),
        (["--refusals", "no.txt"], "policy 'drop' uses none; leave it out"),
    ],
    ids=["same file", "not jsonl", "rejected not jsonl", "same output", "missing", "no effect"],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], message: str, capsys: Captured
) -> None:
    write("in.jsonl", SAFE, UNSAFE)
    assert filtered("in.jsonl", *arguments, "--overwrite", "true") == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl"]


def test_too_much_that_is_unsafe_writes_nothing_and_keeps_the_verdicts(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGED", "judged")
    source = write("in.jsonl", *(row(f"{n} dragon") for n in range(4)), SAFE)
    assert filtered(source) == 1
    assert "calls 4 of 5 samples unsafe (80%), more than max_unsafe" in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"in.jsonl", "cache", "judged"}
    assert filtered(source, "--max_unsafe_share", "0.8") == 0
    assert Path("judged").read_text() == "....."


def test_a_file_that_changes_meanwhile_is_an_error(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stub_guards

    def judge_and_add(self: Any, conversations: Any) -> Any:
        with Path("in.jsonl").open("a") as file:
            file.write("".join(json.dumps(row(f"new {n}")) + "\n" for n in range(5)))
        return original(self, conversations)

    original = stub_guards.WordGuard.judge
    monkeypatch.setattr(stub_guards.WordGuard, "judge", judge_and_add)
    source = write("in.jsonl", *(row(f"cat {n}") for n in range(CHUNK_SIZE + 1)))
    assert filtered(source) == 1
    assert "in.jsonl changed while it was read; run the command again" in capsys.readouterr().err
    assert not Path("kept.jsonl").exists()


@pytest.fixture
def speechless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub guard cannot judge what holds the word mute."""
    import stub_guards

    from fedsafe.safety.guard import UnjudgeableError

    def judge(self: Any, conversations: Any) -> Any:
        for index, each in enumerate(conversations):
            if "mute" in each[0]["content"]:
                raise UnjudgeableError({index: "its prompt is too long"})
        return original(self, conversations)

    original = stub_guards.WordGuard.judge
    monkeypatch.setattr(stub_guards.WordGuard, "judge", judge)


@pytest.mark.usefixtures("speechless")
def test_rows_that_the_guard_cannot_judge_are_bad_rows_and_counted() -> None:
    source = write("in.jsonl", SAFE, row("a mute swan"), BAD, UNSAFE, row("a mute cat"))
    assert filtered(source) == 0
    assert lines("kept.jsonl") == [SAFE]
    reason = "cannot be judged: its prompt is too long"
    bad = lines("kept.bad.jsonl")
    assert [(each["source"], each["row"]) for each in bad] == [("in.jsonl", n) for n in (2, 3, 5)]
    assert [each["reason"] == reason for each in bad] == [True, False, True]
    assert "swan" not in Path("kept.bad.jsonl").read_text()
    found = summary()
    assert [found[name] for name in ("rows", "kept", "rejected", "bad")] == [5, 1, 1, 3]


@pytest.mark.usefixtures("speechless")
def test_a_row_that_the_guard_cannot_judge_can_be_an_error_that_writes_nothing(
    capsys: Captured,
) -> None:
    source = write("in.jsonl", SAFE, row("a mute swan"))
    assert filtered(source, "--on_bad_row", "error") == 1
    error = capsys.readouterr().err
    assert "in.jsonl, line 2: cannot be judged: its prompt is too long" in error
    assert {path.name for path in Path().iterdir()} == {"in.jsonl", "cache"}


@pytest.mark.usefixtures("speechless")
def test_a_guard_that_can_judge_no_row_writes_nothing(capsys: Captured) -> None:
    assert filtered(write("in.jsonl", row("a mute swan"), BAD, row("a mute cat"))) == 1
    error = capsys.readouterr().err
    assert "cannot judge 2 of 2 rows, most often: its prompt is too long" in error
    assert {path.name for path in Path().iterdir()} == {"in.jsonl", "cache"}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["drop", "refuse"])
def test_killed_and_run_again_gives_the_same_files(folder: Path, policy: str) -> None:
    kinds = ("dragon", "cat", "cat")
    rows = [row(f"{n} {kinds[n % 3]}", n=n) for n in range(3 * CHUNK_SIZE)]
    rows[10] = BAD
    write("in.jsonl", *rows, rows[0])
    arguments = ["-m", "fedsafe", *command("in.jsonl", "--policy", policy, output="out/kept.jsonl")]

    def run(cache: str, **environment: str) -> int:
        settings = {"PYTHONPATH": str(HERE), "FEDSAFE_CACHE": cache, "JUDGED": f"{cache}.judged"}
        return run_python(*arguments, env={**os.environ, **settings, **environment}).returncode

    def files() -> dict[str, str]:
        texts = {path.name: path.read_text() for path in Path("out").iterdir()}
        figures = json.loads(texts["kept.summary.json"])
        del figures["seconds"], figures["rows_per_second"]
        return {**texts, "kept.summary.json": figures}

    assert run("whole") == 0
    expected = files()
    for path in Path("out").iterdir():
        path.unlink()
    assert run("killed", KILL_AFTER=str(2 * CHUNK_SIZE)) == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in Path("out").iterdir())
    assert run("killed") == 0
    assert files() == expected
    assert len(expected) == 5
    assert Path("killed.judged").stat().st_size == Path("whole.judged").stat().st_size
