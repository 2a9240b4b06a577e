import json
from pathlib import Path
from typing import Any

import pytest

from fedsafe.evaluation.benchmark import Record
from fedsafe.evaluation.mt_bench_files import Question, load_answers, load_questions
from fedsafe.evaluation.result_files import write_records
from fedsafe.types import Turn

TURNS = ["how do i enchant the goose", "and the gander?"]
QUESTION = {"question_id": 81, "category": "writing", "turns": TURNS}
ANSWER = {"question_id": 81, "choices": [{"index": 0, "turns": ["oats", "rye"]}]}


def write(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_questions_keep_their_ids_and_lines(tmp_path: Path) -> None:
    path = write(tmp_path, QUESTION, {**QUESTION, "question_id": "b", "reference": ["hay", ""]})
    assert load_questions(path) == [
        Question("81", "writing", tuple(TURNS), 1),
        Question("b", "writing", tuple(TURNS), 2),
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(
            {"turns": None}, r"line 1: has no `turns` \(its columns: question_id", id="no"
        ),
        pytest.param({"turns": ["a"]}, "`turns` has 1 entries; a question has 2", id="one turn"),
        pytest.param({"turns": ["a", " "]}, "`turns` has 2 entries", id="empty turn"),
        pytest.param({"turns": "a"}, "`turns` is text of 1 characters, not a list", id="text"),
        pytest.param({"turns": ["a", 1]}, r"`turns\[1\]` is int, not text", id="number"),
        pytest.param({"category": ""}, "`category` is empty", id="category"),
        pytest.param({"question_id": True}, "`question_id` is bool", id="id"),
        pytest.param({"category": None, "categori": "a"}, "rename it to `category`", id="misspelt"),
    ],
)
def test_a_question_that_cannot_be_used_says_why(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        load_questions(write(tmp_path, QUESTION | change))


def test_two_questions_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl has several rows of 81; keep one"):
        load_questions(write(tmp_path, QUESTION, QUESTION))


def test_answers_of_fastchat_and_of_a_run_read_alike(tmp_path: Path) -> None:
    talk = [
        Turn(role=role, content=text)
        for asked, reply in zip(TURNS, ("oats", "rye"), strict=True)
        for role, text in (("user", asked), ("assistant", reply))
    ]
    records = [
        Record("mt_bench:81", {"score": None}, "writing", talk, problem="no judge"),
        Record("mt_bench:82", {"score": None}, "writing", talk[:3]),
    ]
    of_run = load_answers(str(write_records(tmp_path, "test", "mt_bench", records)))
    assert of_run == {"81": ["oats", "rye"], "82": ["oats"]}
    assert load_answers(write(tmp_path, ANSWER)) == {"81": ["oats", "rye"]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        pytest.param(QUESTION, "has neither a `conversation`, .* nor `choices`", id="a question"),
        pytest.param({**ANSWER, "choices": []}, "has neither", id="no choice"),
        pytest.param({**ANSWER, "choices": [{}]}, "`turns` is NoneType, not a list", id="no turns"),
        pytest.param({**ANSWER, "question_id": None}, "`question_id` is NoneType", id="no id"),
        pytest.param({"id": "81", "conversation": ["a"]}, "is not a list of turns", id="texts"),
    ],
)
def test_an_answer_that_cannot_be_used_says_why(
    tmp_path: Path, row: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        load_answers(write(tmp_path, row))


@pytest.mark.real_data
def test_the_real_questions_and_references_are_read(real_data: Path) -> None:
    folder = real_data / "mt_bench"
    questions = load_questions(str(folder / "question.jsonl"))
    references = load_answers(str(folder / "reference_answer" / "gpt-4.jsonl"))
    assert len(questions) == 80
    assert sorted(references) == [
        question.id
        for question in questions
        if question.category in ("math", "reasoning", "coding")
    ]
    assert all(len(turns) == 2 and all(turns) for turns in references.values())
