"""The files of a revision: what is kept of a command that was killed, and where rows go."""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedsafe.data.sources import Rejected
from fedsafe.safety.revision_file import Journal, RevisionOutputs, read_prompts
from fedsafe.safety.transcripts import Transcript
from fedsafe.types import RedTeamPrompt, Turn

SETTINGS = {"seed": 0}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def prompt(row: int, text: str = "how do i enchant the goose") -> RedTeamPrompt:
    return RedTeamPrompt([Turn(role="user", content=text)], None, "in.jsonl", row)


def transcript(row: int, dropped: str | None = None) -> Transcript:
    return Transcript(
        prompt(row), "so", ("bad",), ("better",), ("care",), "base", dropped, ("critique",), 5, 9
    )


PROMPTS = [prompt(row) for row in range(4)]
FIRST = [(2, transcript(2)), (0, transcript(0, "endless"))]
SECOND = [(1, transcript(1)), (3, transcript(3))]


class KilledError(Exception):
    """Stands for what ends a process."""


def left_behind(*batches: Any, settings: dict[str, Any] = SETTINGS) -> Path:
    """The journal of a command that was killed after these batches."""
    journal = Journal(Path("out/.journal"), settings, PROMPTS)
    with suppress(KilledError), journal.open():
        for batch in batches:
            journal.add(batch)
        raise KilledError
    return Path("out/.journal")


def found_by(
    settings: dict[str, Any] = SETTINGS, prompts: Any = PROMPTS, *, overwrite: bool = False
) -> dict[int, Transcript]:
    journal = Journal(Path("out/.journal"), settings, prompts, overwrite=overwrite)
    with pytest.raises(KilledError), journal.open():
        raise KilledError
    return journal.transcripts


def test_finished_batches_are_found_again_as_they_were() -> None:
    left_behind(FIRST, SECOND)
    assert found_by() == dict(FIRST + SECOND)


def test_once_all_is_done_nothing_is_left() -> None:
    journal = Journal(left_behind(FIRST), SETTINGS, PROMPTS)
    with journal.open():
        journal.add(SECOND)
        assert journal.in_order() == [each for _, each in sorted(FIRST + SECOND)]
    assert list(Path("out").iterdir()) == []


def test_a_batch_that_was_cut_off_does_not_count_and_is_no_hindrance() -> None:
    file = left_behind(FIRST, SECOND)
    whole = file.read_bytes()
    begin = whole.index(b"\n", whole.index(b"\n") + 1) + 1  # of the second batch
    for end in range(begin, len(whole)):
        file.write_bytes(whole[:end])
        assert found_by() == dict(FIRST)
        left_behind(SECOND)
        assert file.read_bytes() == whole


@pytest.mark.parametrize("end", [0, 1, 20])
def test_a_journal_that_was_cut_off_at_its_head_is_begun_anew(end: int) -> None:
    file = left_behind(FIRST)
    file.write_bytes(file.read_bytes()[:end])
    assert found_by() == {}
    left_behind(FIRST)
    assert found_by() == dict(FIRST)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"settings": {"seed": 1}}, id="settings"),
        pytest.param({"prompts": [*PROMPTS[:3], prompt(3, "other")]}, id="prompt"),
        pytest.param({"prompts": [*PROMPTS[:3], PROMPTS[3]._replace(response="so")]}, id="answer"),
        pytest.param({"prompts": PROMPTS[:3]}, id="fewer"),
    ],
)
def test_batches_of_other_settings_or_prompts_are_thrown_away_only_when_told(
    other: dict[str, Any],
) -> None:
    kept = left_behind(FIRST).read_bytes()
    journal = Journal(Path("out/.journal"), **({"settings": SETTINGS, "prompts": PROMPTS} | other))
    with (
        pytest.raises(
            ValueError, match=r"out/\.journal holds unfinished work of other settings or"
        ),
        journal.open(),
    ):
        pass
    assert Path("out/.journal").read_bytes() == kept
    assert found_by(**other, overwrite=True) == {}
    assert Path("out/.journal").read_bytes() != kept


def test_a_journal_of_other_settings_that_holds_no_batch_is_no_hindrance() -> None:
    left_behind(settings={"seed": 1})
    assert found_by() == {}
    left_behind(FIRST)
    assert found_by() == dict(FIRST)


def test_each_batch_is_forced_to_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    file = left_behind(FIRST, SECOND)
    assert len(sizes) == 3  # the head, and two batches
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == file.stat().st_size


def test_a_journal_is_complete_when_every_prompt_has_its_transcript() -> None:
    journal = Journal(left_behind(FIRST), SETTINGS, PROMPTS)
    with journal.open():
        assert not journal.is_complete
        journal.add(SECOND)
        assert journal.is_complete


def test_a_file_that_is_removed_before_it_is_locked_is_opened_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = left_behind(FIRST)
    lock = fcntl.flock
    number_of_locks = []

    def late(opened: Any, operation: int) -> None:
        if not number_of_locks:
            file.unlink()
        number_of_locks.append(operation)
        lock(opened, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert left_behind(SECOND).exists()
    assert len(number_of_locks) == 2
    assert found_by() == dict(SECOND)


def test_two_commands_do_not_share_a_journal() -> None:
    ours = Journal(left_behind(FIRST), SETTINGS, PROMPTS)
    with suppress(KilledError), ours.open():
        with pytest.raises(ValueError, match=r"another command is writing out/\.journal; wait"):
            found_by()
        ours.add(SECOND)
        raise KilledError
    assert found_by() == dict(FIRST + SECOND)


# ---- where rows go -------------------------------------------------------------------------------


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out", name).read_text().splitlines()]


def test_pairs_and_what_makes_none_have_the_same_columns() -> None:
    outputs = RevisionOutputs(Path("out/pairs.jsonl"))
    turns = [*prompt(1).messages, Turn(role="assistant", content="so"), *prompt(1).messages]
    refused = Transcript(PROMPTS[2], "no", (), (), (), "base", "refused", (), 1, 1)
    with outputs.files.open():
        outputs.write(transcript(0))
        outputs.write(transcript(1)._replace(prompt=PROMPTS[1]._replace(messages=turns)))
        outputs.write(refused)
        outputs.write(transcript(3, "endless"))
        outputs.write(Rejected("in.jsonl", 4, "is empty"))
    assert outputs.num_rows() == {"kept": 2, "rejected": 2, "bad": 1}
    kept = {
        "prompt": "how do i enchant the goose",
        "init_response": "so",
        "critiques": ["bad"],
        "revisions": ["better"],
        "chosen": "better",
        "rejected": "so",
        "principle": "care",
        "critic": "base",
        "row": 0,
    }
    assert lines("pairs.jsonl") == [kept, {**kept, "prompt": turns, "row": 1}]
    nothing = {"chosen": None, "rejected": None}
    said = {"init_response": "no", "critiques": [], "revisions": [], "principle": ""}
    assert lines("pairs.rejected.jsonl") == [
        {**kept, **nothing, **said, "row": 2, "reason": "refused"},
        {**kept, **nothing, "row": 3, "reason": "endless"},
    ]
    assert lines("pairs.bad.jsonl") == [{"source": "in.jsonl", "row": 4, "reason": "is empty"}]


def test_a_transcript_names_every_principle() -> None:
    outputs = RevisionOutputs(Path("out/pairs.jsonl"))
    twice = {"revisions": ("better", "best"), "principles": ("care", "honesty")}
    with outputs.files.open():
        outputs.write(transcript(0)._replace(**twice))
    [record] = lines("pairs.jsonl")
    assert (record["principle"], record["chosen"]) == ("care, honesty", "best")


def test_the_output_is_a_file_of_json_lines() -> None:
    with pytest.raises(ValueError, match=r"pairs\.csv would hold JSON lines; give a name that end"):
        RevisionOutputs(Path("pairs.csv"))


def test_rows_are_prompts_or_bad_rows_in_order() -> None:
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b"}\n')
    rows = read_prompts("in.jsonl", split="train", on_bad_row="skip")
    assert [type(row) for row in rows] == [RedTeamPrompt, Rejected, RedTeamPrompt]
    with pytest.raises(ValueError, match=r"1 of 3 rows cannot be used:\n  in\.jsonl, line 2"):
        read_prompts("in.jsonl", split="train", on_bad_row="error")


def test_a_file_of_bad_rows_alone_is_an_error() -> None:
    Path("in.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(ValueError, match=r"no row of in\.jsonl can be used:\n.*line 1"):
        read_prompts("in.jsonl", split="train", on_bad_row="skip")
