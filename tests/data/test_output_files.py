import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from fedsafe.data.output_files import OutputFiles, check_jsonl, json_line

KEPT, BAD, SUMMARY = (Path("out", name) for name in ("kept.jsonl", "bad.jsonl", "summary.json"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def output_files() -> OutputFiles:
    return OutputFiles((BAD, SUMMARY, KEPT), unless_empty=(BAD,))


def write_out(*records: dict[str, Any], bad: bool = False) -> OutputFiles:
    files = output_files()
    with files.open():
        for record in records:
            files.write(KEPT, record)
        if bad:
            files.write(BAD, {"row": 1})
        files.write_summary(SUMMARY, {"rows": len(records)})
    return files


def hidden() -> set[str]:
    return {path.name for path in Path("out").iterdir() if path.name.startswith(".")}


def test_the_files_appear_together_when_all_is_done() -> None:
    files = output_files()
    with files.open():
        files.write(KEPT, {"a": 1})
        assert files.written() == []
        assert len(hidden()) == 3
    assert files.written() == [SUMMARY, KEPT]
    assert hidden() == set()
    assert write_out({"a": 1}, bad=True).written() == [BAD, SUMMARY, KEPT]
    assert write_out({"a": 1}).written() == [SUMMARY, KEPT]


def test_lines_are_counted_from_each_opening() -> None:
    files = write_out({"a": 1}, {"a": 2}, bad=True)
    assert files.num_lines == {KEPT: 2, BAD: 1}
    with files.open():
        files.write(KEPT, {"a": 1})
    assert files.num_lines == {KEPT: 1}


def test_an_error_leaves_files_as_they_were() -> None:
    files = write_out({"a": 1})
    before = {path: path.read_text() for path in Path("out").iterdir()}
    with suppress(OSError), files.open():
        files.write(KEPT, {"a": 2})
        raise OSError("no place for this")
    assert {path: path.read_text() for path in Path("out").iterdir()} == before


def test_two_processes_do_not_write_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = output_files()
    with ours.open():
        ours.write(KEPT, {"who": "ours"})
        with monkeypatch.context() as other:
            other.setattr("os.getpid", os.getppid)
            write_out({"who": "theirs"})
        assert json.loads(KEPT.read_text()) == {"who": "theirs"}
    assert json.loads(KEPT.read_text()) == {"who": "ours"}


def test_what_a_killed_process_left_is_removed() -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    Path("out").mkdir()
    names = [f".kept.jsonl.{platform.node()}-{pid}.part" for pid in (killed.pid, os.getppid())]
    names += [f".kept.jsonl.elsewhere-{killed.pid}.part", ".kept.jsonl.mine.part"]
    for name in names:
        Path("out", name).touch()
    write_out({"a": 1})
    assert hidden() == set(names[1:])


def test_nothing_is_written_over_unless_it_is_asked_for() -> None:
    files = output_files()
    files.check(Path("in.jsonl"), overwrite=False)
    write_out({"a": 1})
    with pytest.raises(ValueError, match=r"summary\.json, out/kept\.jsonl would be overwritten; g"):
        files.check(Path("in.jsonl"), overwrite=False)
    files.check(Path("in.jsonl"), overwrite=True)
    with pytest.raises(ValueError, match=r"out/\.\./out/kept\.jsonl is read and would be written"):
        files.check(Path("out/../out/kept.jsonl"), overwrite=True)


def test_a_file_of_json_lines_is_named_so() -> None:
    check_jsonl(KEPT)
    with pytest.raises(ValueError, match=r"kept\.json would hold JSON lines; give a name that end"):
        check_jsonl(Path("kept.json"))


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"a": "안녕 é"}, '{"a": "안녕 é"}\n'),
        ({"a": "\ud83d 안"}, '{"a": "\\ud83d \\uc548"}\n'),
        ({"a": datetime(2024, 5, 1, tzinfo=UTC)}, '{"a": "2024-05-01 00:00:00+00:00"}\n'),
        ({"a": [Decimal("1.10")]}, '{"a": ["1.10"]}\n'),
        ({"a": "one\ntwo", "b": None}, '{"a": "one\\ntwo", "b": null}\n'),
    ],
    ids=["other scripts", "half a pair", "date", "decimal", "line end"],
)
def test_a_record_becomes_one_line_that_can_be_written(record: dict[str, Any], line: str) -> None:
    assert json_line(record) == line
    assert line.encode()
    json.loads(line)


def test_bytes_are_no_json() -> None:
    with pytest.raises(TypeError, match="holds bytes, which a JSONL file cannot hold; drop that"):
        json_line({"a": b"\x00"})
