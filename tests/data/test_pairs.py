import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from fedsafe.data.pairs import load_pairs
from fedsafe.types import PreferencePair

ASKED = "how do i enchant the goose"
USER = {"role": "user", "content": ASKED}
GOOD_TURN = {"role": "assistant", "content": "better not"}
BAD_TURN = {"role": "assistant", "content": "take a wand"}
SYSTEM = {"role": "system", "content": "be brief"}
TEXTS: dict[str, Any] = {"prompt": ASKED, "chosen": "better not", "rejected": "take a wand"}
TURNS: dict[str, Any] = {"prompt": [USER], "chosen": [GOOD_TURN], "rejected": [BAD_TURN]}
WHOLE: dict[str, Any] = {"chosen": [USER, GOOD_TURN], "rejected": [USER, BAD_TURN]}
TRANSCRIPT: dict[str, Any] = {
    **TEXTS,
    "init_response": "take a wand",
    "critiques": ["this answer is harmful"],
    "revisions": ["better not"],
    "principle": "harmless",
    "critic": "base",
    "row": 7,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in its own folder, so that sources have short names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(*rows: object, path: str = "a.jsonl") -> str:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def load_quietly(row: object, *, need_rejected: bool) -> PreferencePair:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (pair,) = load_pairs(write(row), need_rejected=need_rejected)
    return pair


ROWS: dict[str, dict[str, Any]] = {
    "texts": TEXTS,
    "transcript": TRANSCRIPT,
    "turns": TURNS,
    "text and turns": TURNS | {"prompt": ASKED},
    "turns and texts": TEXTS | {"prompt": [USER]},
    "whole conversations": WHOLE,
    "prompt apart and in each": WHOLE | {"prompt": ASKED},
    "hh-rlhf": {
        "chosen": f"\n\nHuman: {ASKED}\n\nAssistant: better not",
        "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: take a wand",
    },
    "metadata": TEXTS | {"client": "ada", "label": "unsafe", "category": "S1"},
}


@pytest.mark.parametrize("need_rejected", [True, False], ids=["needed", "not needed"])
@pytest.mark.parametrize("kind", ROWS)
def test_each_format_becomes_the_same_pair(kind: str, need_rejected: bool) -> None:
    pair = load_quietly(ROWS[kind], need_rejected=need_rejected)
    assert pair == PreferencePair([USER], "better not", "take a wand", "a.jsonl", 1)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, USER, BAD_TURN, USER], "chosen": "x", "rejected": "y"},
        {
            "prompt": [SYSTEM, USER],
            "chosen": [BAD_TURN, USER, {"role": "assistant", "content": "x"}],
            "rejected": [BAD_TURN, USER, {"role": "assistant", "content": "y"}],
        },
        {
            "chosen": [SYSTEM, USER, BAD_TURN, USER, {"role": "assistant", "content": "x"}],
            "rejected": [SYSTEM, USER, BAD_TURN, USER, {"role": "assistant", "content": "y"}],
        },
    ],
    ids=["prompt", "answers", "conversations"],
)
def test_earlier_exchanges_belong_to_the_prompt(row: dict[str, Any]) -> None:
    pair = load_quietly(row, need_rejected=True)
    assert pair.prompt == [SYSTEM, USER, BAD_TURN, USER]
    assert (pair.chosen, pair.rejected) == ("x", "y")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "response": "better not"},
        {"instruction": ASKED, "output": "better not"},
        {"messages": [USER, GOOD_TURN]},
        {"prompt": ASKED, "chosen": "better not"},
        TEXTS | {"rejected": None},
    ],
    ids=["prompt", "instruction", "messages", "no rejected", "null rejected"],
)
def test_a_good_answer_alone_is_a_pair_where_no_worse_one_is_needed(row: dict[str, Any]) -> None:
    pair = load_quietly(row, need_rejected=False)
    assert pair == PreferencePair([USER], "better not", None, "a.jsonl", 1)


def test_of_a_plain_conversation_the_last_answer_is_the_chosen_one() -> None:
    turns = [SYSTEM, USER, BAD_TURN, USER, GOOD_TURN]
    pair = load_quietly({"messages": turns, "client": "ada"}, need_rejected=False)
    assert (pair.prompt, pair.chosen) == (turns[:-1], "better not")


def test_columns_that_are_not_read_are_named_in_one_warning() -> None:
    turns = [USER, GOOD_TURN | {"name": "Ann"}]
    path = write(WHOLE | {"chosen": turns, "score": 1}, {"messages": [USER, GOOD_TURN], "id": 1})
    with pytest.warns(UserWarning, match=r"not read: chosen\.name, id, score$") as caught:
        assert len(load_pairs(path, need_rejected=False)) == 2
    assert len(caught) == 1


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in TEXTS.items() if key != name}


BAD_ROWS: dict[str, tuple[object, str]] = {
    "no chosen": (without("chosen"), r"has no `chosen` \(its columns: prompt, rejected\)"),
    "no rejected": (without("rejected"), r"has no `rejected` \(its columns: prompt, chosen\)"),
    "null chosen": (TEXTS | {"chosen": None}, "has no `chosen`"),
    "no prompt": (without("prompt"), "`chosen` is neither a list of turns nor a text that begins"),
    "plain sample": ({"prompt": "x", "response": "y"}, "has no `chosen`"),
    "misspelt": (without("chosen") | {"choosen": "x"}, "has a column `choosen`; rename it to `cho"),
    "equal": (TEXTS | {"rejected": " better not\n"}, "`chosen` and `rejected` are equal; nothing"),
    "empty": (TEXTS | {"rejected": " "}, "`rejected` is empty"),
    "empty prompt": (TEXTS | {"prompt": ""}, "`prompt` is empty"),
    "type": (TEXTS | {"chosen": 3}, "`chosen` is not a list of turns with `role` and `content`"),
    "prompt answered": (
        TURNS | {"prompt": [USER, GOOD_TURN]},
        "the last turn of `prompt` is not the user's",
    ),
    "no turns": (TURNS | {"chosen": []}, "the last turn of `chosen` is not the assistant's"),
    "no answer": (
        WHOLE | {"rejected": [USER, BAD_TURN, USER]},
        "the last turn of `rejected` is not the assistant's",
    ),
    "two answers": (
        WHOLE | {"chosen": [USER, BAD_TURN, GOOD_TURN]},
        "the turn before the last answer of `chosen` is not the user's",
    ),
    "answer alone": (
        {"chosen": [GOOD_TURN], "rejected": [BAD_TURN]},
        "the turn before the last answer of `chosen` is not the user's",
    ),
    "beginnings": (
        WHOLE | {"rejected": [SYSTEM, USER, BAD_TURN]},
        "`chosen` and `rejected` differ before their last answers",
    ),
    "other prompt": (
        WHOLE | {"prompt": "hello"},
        "`chosen` is a conversation that does not begin with `prompt`",
    ),
    "empty turn": (
        TURNS | {"rejected": [BAD_TURN | {"content": ""}]},
        r"`rejected\[0\].content` is empty",
    ),
    "hh-rlhf empty": (
        {"chosen": "\n\nHuman: x\n\nAssistant:", "rejected": "\n\nHuman: x\n\nAssistant: y"},
        "turn 1 of `chosen` is empty",
    ),
    "no object": ("x", "holds a str, not an object with named fields"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_an_error_with_file_line_and_reason(kind: str) -> None:
    row, reason = BAD_ROWS[kind]
    expected = f"1 of 2 rows cannot be used:\n  a.jsonl, line 2: {reason}"
    with pytest.raises(ValueError, match=expected):
        load_pairs(write(TEXTS, row), need_rejected=True)


BAD_SAMPLES: dict[str, tuple[object, str]] = {
    "no format": ({"goal": "x"}, "is in none of the formats messages, prompt/response"),
    "no answer": ({"prompt": "x"}, "has no `response`"),
    "misspelt": ({"prompt": "x", "reponse": "y"}, "rename it to `response`"),
    "rejected alone": (without("chosen"), "has no `chosen`"),
    "last turns": ({"messages": [USER, BAD_TURN, GOOD_TURN]}, "the turn before the last answer of"),
    "equal": (TEXTS | {"rejected": "better not"}, "`chosen` and `rejected` are equal"),
    "no object": (None, "holds a NoneType, not an object"),
}


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_a_bad_row_is_an_error_also_where_no_worse_answer_is_needed(kind: str) -> None:
    row, reason = BAD_SAMPLES[kind]
    with pytest.raises(ValueError, match=f"line 2: .*{reason}"):
        load_pairs(write(TEXTS, row), need_rejected=False)


def test_skipped_rows_are_counted_and_listed_without_their_text() -> None:
    write(TEXTS, TEXTS | {"rejected": "better not"}, TEXTS)
    with pytest.warns(UserWarning, match="left out 1 of 3 rows"):
        pairs = load_pairs(
            "a.jsonl", need_rejected=True, on_bad_row="skip", rejected=Path("rejected.jsonl")
        )
    assert [each.row for each in pairs] == [1, 3]
    (line,) = Path("rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 2
    assert "better" not in line


def test_a_file_without_a_usable_row_is_an_error_even_when_skipping() -> None:
    with (
        pytest.warns(UserWarning, match="left out 1 of 1"),
        pytest.raises(ValueError, match=r"no row of a\.jsonl can be used"),
    ):
        load_pairs(write({"prompt": "x"}), need_rejected=True, on_bad_row="skip")


@pytest.mark.real_data
def test_preferences_of_hh_rlhf_are_read_but_for_nine(real_data: Path) -> None:
    path = str(real_data / "hh_rlhf" / "test.jsonl.gz")
    with pytest.warns(UserWarning, match="left out 9 of 2312 rows"):
        pairs = load_pairs(path, need_rejected=True, on_bad_row="skip")
    assert len(pairs) == 2303
    assert all(pair.prompt[-1]["role"] == "user" for pair in pairs)


@pytest.mark.real_data
def test_the_alpaca_file_gives_good_answers(real_data: Path) -> None:
    pairs = load_pairs(str(real_data / "benign" / "alpaca_en_demo.json"), need_rejected=False)
    assert len(pairs) == 999
    assert {pair.rejected for pair in pairs} == {None}
