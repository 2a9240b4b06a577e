import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsafe.data.sources import CheckedRow, Rejected
from fedsafe.safety.filter import SafetyFilter
from fedsafe.safety.filter_file import (
    FilteredRow,
    Outputs,
    count_rows,
    filtered,
    usable_rows,
)
from fedsafe.safety.guard import Guard, UnjudgeableError
from fedsafe.safety.score_cache import CHUNK_SIZE
from fedsafe.types import Conversation, Sample, Turn, Verdict


class RedGuard(Guard):
    """What holds the word red is unsafe."""

    name = "red"
    identity = "red"

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        return [Verdict(float("red" in str(each)), (), self.name) for each in conversations]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSAFE_CACHE", str(tmp_path / "cache"))


def checked(number: int, prompt: str, **columns: Any) -> CheckedRow:
    turns = [Turn(role="user", content=prompt), Turn(role="assistant", content="yes")]
    record = {"prompt": prompt, "response": "yes", **columns}
    label = columns.get("label")
    about = {"client": None, "category": None, "source": "in.jsonl"}
    return CheckedRow(record, Sample(messages=turns, label=label, row=number, **about), None)


BAD = CheckedRow({}, None, Rejected("in.jsonl", 2, "is empty"))


def filter_all(rows: list[CheckedRow], policy: Any = "drop") -> list[FilteredRow | Rejected]:
    safety = SafetyFilter(RedGuard(), policy)
    return [row for window in filtered(rows, safety) for row in window]


def test_rows_come_back_in_their_order_bad_ones_too() -> None:
    first, second, third = filter_all([checked(1, "red"), BAD, checked(3, "blue")])
    assert isinstance(first, FilteredRow)
    assert (first.action, first.unsafe, first.kept) == ("dropped", True, None)
    assert second == BAD.rejected
    assert isinstance(third, FilteredRow)
    assert (third.action, third.kept) == ("kept", third.record)


def test_no_more_than_a_window_is_read_ahead() -> None:
    read: list[int] = []

    def endless() -> Iterator[CheckedRow]:
        while True:
            read.append(1)
            yield checked(len(read), f"blue {len(read)}")

    windows = filtered(endless(), SafetyFilter(RedGuard()))
    assert len(next(windows)) == CHUNK_SIZE
    assert len(next(windows)) == CHUNK_SIZE
    assert len(read) == 2 * CHUNK_SIZE


@pytest.mark.parametrize("label", ["unsafe", None])
def test_a_repaired_row_that_is_labelled_is_safe_now(label: str | None) -> None:
    columns = {"label": label} if label else {}
    row, same = filter_all([checked(1, "red", **columns), checked(2, "red", **columns)], "refuse")
    assert isinstance(row, FilteredRow)
    assert row.kept is not None
    assert row.action == "refused"
    assert row.kept["response"] not in ("yes", "")
    assert row.kept.get("label") == ("safe" if label else None)
    assert row.record["response"] == "yes"
    assert isinstance(same, FilteredRow)
    assert same.kept == row.kept


def test_what_the_policy_keeps_stays_as_it_is() -> None:
    (row,) = filter_all([checked(1, "red", label="unsafe")], "keep")
    assert isinstance(row, FilteredRow)
    assert (row.action, row.unsafe, row.kept) == ("kept", True, row.record)


def test_bytes_make_a_row_bad() -> None:
    rows = [{"prompt": "a", "response": "b", "image": each} for each in (None, b"\x00\xff")]
    pq.write_table(pa.Table.from_pylist(rows), "in.parquet")
    good, bad = usable_rows("in.parquet")
    assert good.rejected is None
    reason = "holds bytes, which a JSONL file cannot hold; drop that column"
    assert bad.rejected == Rejected("in.parquet", 1, reason)
    assert count_rows("in.parquet", on_bad_row="skip") == 2
    with pytest.raises(ValueError, match=f"1 of 2 rows cannot be used:\n.*row 1: {reason}"):
        count_rows("in.parquet", on_bad_row="error")


def test_a_file_of_bad_rows_alone_is_an_error() -> None:
    Path("in.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"no row of in.jsonl can be used:\n.*has no `response`"):
        count_rows("in.jsonl", on_bad_row="skip")


def write_out(rows: list[CheckedRow]) -> None:
    outputs = Outputs(Path("out/kept.jsonl"))
    with outputs.files.open():
        for row in filter_all(rows):
            outputs.write(row)


def test_a_verdict_takes_no_columns_place() -> None:
    write_out([checked(1, "red", verdict="mine"), checked(2, "red", verdict=1, verdict_2=2)])
    lines = Path("out/kept.rejected.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert (first["verdict"], first["verdict_2"]["unsafe"]) == ("mine", 1.0)
    assert (second["verdict_2"], second["verdict_3"]["unsafe"]) == (2, 1.0)


# ---- rows that the guard cannot judge ------------------------------------------------------------


class SpeechlessGuard(RedGuard):
    """Cannot judge what holds the word mute."""

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        for index, each in enumerate(conversations):
            if "mute" in str(each):
                raise UnjudgeableError({index: "it makes a prompt of 9 tokens"})
        return super().judge(conversations)


def judged_by(rows: list[CheckedRow], **settings: Any) -> list[FilteredRow | Rejected]:
    safety = SafetyFilter(SpeechlessGuard())
    return [row for window in filtered(rows, safety, **settings) for row in window]


def action_of(row: FilteredRow | Rejected) -> str:
    return row.action if isinstance(row, FilteredRow) else row.reason


def test_a_row_that_cannot_be_judged_is_a_bad_row_in_its_place() -> None:
    texts = ["red 1", "mute 2", "bad", "blue 4", "mute 5", "mute 2", "red 7"]
    rows = [BAD if t == "bad" else checked(n, t) for n, t in enumerate(texts, start=1)]
    found = judged_by(rows)
    mute = "cannot be judged: it makes a prompt of 9 tokens"
    expected = ["dropped", mute, "is empty", "kept", mute, mute, "dropped"]
    assert [action_of(row) for row in found] == expected
    assert found[4] == Rejected("in.jsonl", 5, mute)
    assert rows[1].sample is not None, "the rows given were changed"


def test_later_windows_are_judged_though_one_has_nothing_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedsafe.safety.filter_file.CHUNK_SIZE", 4)
    rows = [*(checked(n, f"mute {n}") for n in range(4)), checked(4, "blue")]
    actions = [action_of(row) for row in judged_by(rows)]
    assert actions[-1] == "kept"
    assert all("cannot be judged" in action for action in actions[:-1])


def test_a_guard_that_can_judge_no_row_is_an_error() -> None:
    rows = [checked(1, "mute 1"), BAD, checked(3, "mute 3")]
    message = (
        "the guard red cannot judge 2 of 2 rows, most often: it makes a prompt of 9 tokens; likely "
        "the guard is set up wrongly"
    )
    with pytest.raises(ValueError, match=message):
        judged_by(rows)


def test_a_guard_that_cannot_judge_most_of_a_window_is_an_error_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedsafe.safety.filter_file.CHUNK_SIZE", 20)
    half = [checked(n, f"{'mute' if n < 10 else 'blue'} {n}") for n in range(20)]
    windows = filtered([*half, checked(0, "mute 0"), *half[:-1]], SafetyFilter(SpeechlessGuard()))
    assert len(next(windows)) == 20
    with pytest.raises(ValueError, match="cannot judge 11 of 20 rows"):
        next(windows)


def test_bad_rows_say_nothing_of_the_guard() -> None:
    rows = [*[BAD] * 30, *(checked(n, f"mute {n}") for n in range(10)), checked(11, "blue")]
    assert len(judged_by(rows)) == 41


def test_a_row_that_cannot_be_judged_can_be_an_error() -> None:
    rows = [checked(1, "blue"), BAD, checked(3, "mute")]
    message = (
        "in.jsonl, line 3: cannot be judged: it makes a prompt of 9 tokens; take the row out, "
        "or set on_bad_row: skip"
    )
    with pytest.raises(ValueError, match=message):
        judged_by(rows, on_bad_row="error")
