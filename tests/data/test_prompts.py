import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from fedsafe.data.prompts import load_prompts
from fedsafe.types import RedTeamPrompt

USER = {"role": "user", "content": "how do i enchant the goose"}
ASSISTANT = {"role": "assistant", "content": "take a wand"}
SYSTEM = {"role": "system", "content": "be brief"}
TEXT = USER["content"]
GOOD: dict[str, Any] = {"prompt": TEXT}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in its own folder, so that sources have short names."""
    monkeypatch.chdir(tmp_path)


def write(*rows: object, path: str = "a.jsonl") -> str:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


ROWS: dict[str, tuple[dict[str, Any], list[dict[str, str]], str | None]] = {
    "text": (GOOD, [USER], None),
    "text with a response": (GOOD | {"response": "take a wand"}, [USER], "take a wand"),
    "null response": (GOOD | {"response": None}, [USER], None),
    "empty response, as in CSV": (GOOD | {"response": ""}, [USER], None),
    "turns": ({"prompt": [SYSTEM, USER, ASSISTANT, USER]}, [SYSTEM, USER, ASSISTANT, USER], None),
    "messages": ({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}, [SYSTEM, USER], None),
    "messages without an answer": ({"messages": [USER]}, [USER], None),
    "hh-rlhf": (
        {"chosen": f"\n\nHuman: {TEXT}\n\nAssistant: no\n\nHuman: why", "rejected": "\n\nHuman: "},
        [USER],
        None,
    ),
    "hh-rlhf with an empty answer": ({"chosen": f"\n\nHuman: {TEXT}\n\nAssistant:"}, [USER], None),
    "chosen turns": ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, [USER], None),
    "metadata": (GOOD | {"category": "S1", "label": "unsafe", "client": 3}, [USER], None),
}


@pytest.mark.parametrize("kind", ROWS)
def test_each_format_becomes_a_prompt(kind: str) -> None:
    row, messages, response = ROWS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_prompts(write(row)) == [RedTeamPrompt(messages, response, "a.jsonl", 1)]


def test_sources_of_several_types_are_read_one_after_the_other() -> None:
    write(GOOD, GOOD)
    Path("b.csv").write_text("prompt,response,category\nhex it,,S1\njinx it,do,S2\n")
    Path("c.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    prompts = load_prompts(["a.jsonl", "b.csv", "c.jsonl.gz"])
    assert [(each.source, each.row) for each in prompts] == [
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("b.csv", 2),
        ("b.csv", 3),
        ("c.jsonl.gz", 1),
        ("c.jsonl.gz", 2),
    ]
    assert [each.response for each in prompts[2:4]] == [None, "do"]


def test_columns_that_are_not_read_are_named_in_one_warning() -> None:
    write({"messages": [USER | {"name": "Ann"}], "response": "x"}, GOOD | {"id": 1})
    expected = r"not read: id, messages\.name, response"
    with pytest.warns(UserWarning, match=expected) as caught:
        load_prompts("a.jsonl")
    assert len(caught) == 1


BAD_ROWS: dict[str, tuple[object, str]] = {
    "no prompt": (
        {"goal": "x", "target": "y"},
        "has none of `prompt`, `messages`, `chosen`; its columns: goal, target",
    ),
    "null prompt": ({"prompt": None}, "has none of `prompt`"),
    "misspelt": ({"promt": "x"}, "has a column `promt`; rename it to `prompt`, or drop it"),
    "response misspelt": (GOOD | {"reponse": "x"}, "has a column `reponse`; rename it to `resp"),
    "empty": ({"prompt": " "}, "`prompt` is empty"),
    "type": ({"prompt": 7}, "`prompt` is not a list of turns"),
    "response type": (GOOD | {"response": 7}, "`response` is int, not text"),
    "blank response": (GOOD | {"response": " "}, "`response` is empty"),
    "no turns": ({"prompt": []}, "the last turn of `prompt` is not the user's"),
    "answered": ({"prompt": [USER, ASSISTANT]}, "the last turn of `prompt` is not the user's"),
    "role": (
        {"prompt": [{"role": "human", "content": "x"}]},
        r"the role of `prompt\[0\]` is text of 5 characters, not system, user or assistant",
    ),
    "empty turn": ({"messages": [USER | {"content": ""}]}, r"`messages\[0\].content` is empty"),
    "answer first": ({"messages": [ASSISTANT, USER]}, "`messages` has no turn of the user before"),
    "no user": ({"messages": [SYSTEM, ASSISTANT]}, "`messages` has no turn of the user before the"),
    "plain chosen": ({"chosen": "no"}, "`chosen` is neither a list of turns nor a text that begin"),
    "hh-rlhf empty": ({"chosen": "\n\nHuman: \n\nAssistant: no"}, "turn 0 of `chosen` is empty"),
    "hh-rlhf answer": ({"chosen": "\n\nAssistant: no"}, "`chosen` has no turn of the user before"),
    "no object": ([TEXT], "holds a list, not an object with named fields"),
    "surrogate": ({"prompt": "a\ud800"}, "`prompt` is not valid UTF-8 at character 1"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_an_error_with_file_line_and_reason(kind: str) -> None:
    row, reason = BAD_ROWS[kind]
    expected = f"1 of 2 rows cannot be used:\n  a.jsonl, line 2: {reason}"
    with pytest.raises(ValueError, match=expected):
        load_prompts(write(GOOD, row))


def test_a_broken_line_is_an_error_with_its_place() -> None:
    Path("a.jsonl").write_text('{"prompt": "a"}\n{"prompt"', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: broken JSON"):
        load_prompts("a.jsonl")
    Path("a.json").write_text('[\n{"prompt": "a"},\n3]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json, row 1: \(line 3\) holds a int"):
        load_prompts("a.json")


def test_skipped_rows_are_counted_and_listed_without_their_text() -> None:
    write(GOOD, {"goal": "secret words"}, GOOD)
    with pytest.warns(UserWarning, match=r"left out 1 of 3 rows \(all are listed in rejected"):
        prompts = load_prompts("a.jsonl", on_bad_row="skip", rejected=Path("rejected.jsonl"))
    assert [each.row for each in prompts] == [1, 3]
    (line,) = Path("rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "source": "a.jsonl",
        "row": 2,
        "reason": "has none of `prompt`, `messages`, `chosen`; its columns: goal",
    }


def test_a_file_without_a_usable_row_is_an_error_even_when_skipping() -> None:
    with (
        pytest.warns(UserWarning, match="left out 1 of 1"),
        pytest.raises(ValueError, match=r"no row of a\.jsonl can be used:\n  a\.jsonl, line 1"),
    ):
        load_prompts(write({"goal": "x"}), on_bad_row="skip")


def test_sources_that_cannot_be_read_are_errors() -> None:
    with pytest.raises(ValueError, match="no path is given"):
        load_prompts([])
    with pytest.raises(ValueError, match=r"no\.jsonl is missing; give the path"):
        load_prompts("no.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl is empty"):
        load_prompts(write())
    Path("a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt has an unknown file type"):
        load_prompts("a.txt")


def test_a_dataset_folder_is_read_with_its_split() -> None:
    Path("mine").mkdir()
    write(GOOD, path="mine/train.jsonl")
    write(GOOD, GOOD, path="mine/test.jsonl")
    prompts = load_prompts("mine", split="test")
    assert [(each.source, each.row) for each in prompts] == [("mine", 0), ("mine", 1)]


@pytest.mark.real_data
def test_first_turns_of_hh_rlhf_are_read(real_data: Path) -> None:
    prompts = load_prompts(str(real_data / "hh_rlhf" / "test.jsonl.gz"))
    assert len(prompts) == 2312
    first = prompts[:200]
    assert [each.row for each in first] == list(range(1, 201))
    assert all([turn["role"] for turn in each.messages] == ["user"] for each in first)
    texts = [each.messages[0]["content"] for each in first]
    assert texts[0] == "what are some pranks with a pen i can do?"
    assert not any("Assistant:" in text or text != text.strip() for text in texts)


@pytest.mark.real_data
def test_prompts_of_xstest_are_read_though_its_labels_judge_them(real_data: Path) -> None:
    with pytest.warns(UserWarning, match="not read: focus, id, note, type"):
        prompts = load_prompts(str(real_data / "xstest" / "xstest_prompts.csv"))
    assert len(prompts) == 450
