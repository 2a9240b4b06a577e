"""`sources.iterate_file` and `sources.with_answer`: a file row by row, as it is."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsafe.data import sources
from fedsafe.data.readers import READERS, Row
from fedsafe.data.sources import Rejected, iterate_file, load_samples, with_answer

GOOD: dict[str, Any] = {"prompt": "Hi", "response": "Hello.", "score": 0.5, "client": "ada"}
BAD: dict[str, Any] = {"prompt": "Hi"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in its own folder, so that sources have short names."""
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict[str, Any]]) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".json"):
        Path(name).write_text(json.dumps(rows))
    elif name.endswith(".csv"):
        cells = [",".join(str(row.get(key, "")) for key in GOOD) for row in rows]
        Path(name).write_text("\n".join([",".join(GOOD), *cells]) + "\n")
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), name)
    else:
        Path(name).write_text(lines)
    return name


@pytest.mark.parametrize("end", sorted(READERS))
def test_rows_of_every_file_type_come_with_their_record(end: str) -> None:
    first, second = iterate_file(write(f"rows{end}", [GOOD, BAD]))
    assert {name: str(value) for name, value in first.record.items()} == {
        name: str(value) for name, value in GOOD.items()
    }
    assert first.sample is not None
    assert first.sample["client"] == "ada"
    assert first.rejected is None
    assert second.sample is None
    assert second.rejected is not None
    assert "`response`" in second.rejected.reason


def test_the_samples_are_those_of_load_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns, "label": "safe"}, {"prompt": "c", "response": "d"}]
    name = write("rows.jsonl", rows)
    assert [row.sample for row in iterate_file(name)] == list(load_samples(name))


def test_a_bad_row_says_where_it_stands() -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n\n{"prompt": \n')
    rejected = [row.rejected for row in iterate_file("rows.jsonl")]
    assert rejected[0] is None
    assert isinstance(rejected[1], Rejected)
    assert (rejected[1].source, rejected[1].row) == ("rows.jsonl", 3)
    assert rejected[1].reason.startswith("broken JSON")


def test_rows_are_read_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def endless(path: Path) -> Iterator[Row]:
        while True:
            read.append(1)
            yield Row(len(read), GOOD)

    monkeypatch.setitem(READERS, ".jsonl", endless)
    rows = iterate_file(write("rows.jsonl", [GOOD]))
    next(rows)
    next(rows)
    assert len(read) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.jsonl", None, "nowhere.jsonl is missing; give the path of an existing file"),
        ("rows.txt", "hi", "rows.txt has an unknown file type; known are .jsonl"),
        ("rows.jsonl", "", "rows.jsonl is empty; it needs at least one sample"),
    ],
    ids=["missing", "unknown type", "empty"],
)
def test_a_file_without_rows_is_an_error(name: str, content: str | None, message: str) -> None:
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(iterate_file(name))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a", "response": "b", "n": 1}, {"prompt": "a", "response": "X", "n": 1}),
        ({"prompt": "b", "response": "b"}, {"prompt": "b", "response": "X"}),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": "X"}),
        (
            {"messages": None, "prompt": "a", "response": "b"},
            {"messages": None, "prompt": "a", "response": "X"},
        ),
        (
            {"prompt": "a", "response": " safe", "label": "safe", "raw": "safe\n", "n": "b"},
            {"prompt": "a", "response": "X", "label": "safe", "raw": "X", "n": "b"},
        ),
    ],
    ids=["prompt", "echo", "instruction", "null messages", "copy"],
)
def test_an_answer_is_replaced_in_its_format(
    record: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert with_answer(record, "X") == expected


def test_beside_messages_every_answer_is_replaced() -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "b", "weight": 1},
    ]
    record = {"messages": turns, "response": "b ", "output": "other", "raw": None}
    changed = with_answer(record, "X")
    assert changed["messages"] == [*turns[:3], {**turns[3], "content": "X"}]
    assert (changed["response"], changed["output"], changed["raw"]) == ("X", "X", None)
    assert "response" not in with_answer({"messages": turns}, "X")
    assert with_answer({**record, "response": None}, "X")["response"] is None
    assert record["messages"][-1]["content"] == "b"
    assert sources.parse_sample(changed)["messages"][-1]["content"] == "X"
