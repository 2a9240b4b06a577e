"""The files of MT-Bench: its questions, reference answers, and replies of models.

The formats are FastChat's, https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge; replies
are read from the `replies/` of a run too.
"""

from typing import Any, NamedTuple

from fedsafe.data.fields import (
    BadRowError,
    fields_of,
    kind,
    refuse_misspelt,
    require,
    shortened,
    text_of,
)
from fedsafe.data.rows import read_rows

NUM_TURNS = 2
ID_PREFIX = "mt_bench:"
"""Begins the id of a record in the replies of a run."""
_QUESTION_FIELDS = ("question_id", "category", "turns")


class Question(NamedTuple):
    """One question."""

    id: str
    category: str
    turns: tuple[str, ...]
    """What the user says in each turn."""
    row: int
    """Line (JSONL) or row in the source."""


def load_questions(path: str, *, split: str = "train") -> list[Question]:
    """Read the questions of a file or hub name.

    Raises:
        ValueError: If the file is missing or empty, rows cannot be used, or two share an id.
    """
    questions = read_rows(path, _question, split=split, on_bad_row="error", rejected=None)
    _refuse_doubles([question.id for question in questions], path)
    return questions


def load_answers(path: str) -> dict[str, list[str]]:
    """Read what a model replied to each question, by the question's id.

    Args:
        path: A JSONL file of FastChat's `model_answer` or `reference_answer`, or `replies/….jsonl`
            of a run; a question that was not replied to in both turns has fewer texts.

    Raises:
        ValueError: If the file is missing or empty, rows cannot be used, or two share an id.
    """
    answers = read_rows(path, _answer, split="train", on_bad_row="error", rejected=None)
    _refuse_doubles([name for name, _ in answers], path)
    return dict(answers)


def _question(record: object, source: str, row: int) -> tuple[Question, set[str]]:
    fields = fields_of(record)
    refuse_misspelt(fields, _QUESTION_FIELDS)
    require(fields, _QUESTION_FIELDS)
    turns = _texts(fields, "turns")
    if len(turns) != NUM_TURNS or not all(turn.strip() for turn in turns):
        raise BadRowError(
            f"`turns` has {len(turns)} entries; a question has {NUM_TURNS}, not empty"
        )
    category = text_of(fields, "category")
    # `reference` holds hints to human judges, such as "Uncertain.", and is no reference answer
    return Question(_id(fields, "question_id"), category, tuple(turns), row), set()


def _answer(record: object, source: str, row: int) -> tuple[tuple[str, list[str]], set[str]]:
    fields = fields_of(record)
    if "conversation" in fields:
        turns = fields["conversation"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise BadRowError("`conversation` is not a list of turns")
        said = [turn.get("content") for turn in turns if turn.get("role") == "assistant"]
        name = _id(fields, "id").removeprefix(ID_PREFIX)
        return (name, _texts({"conversation": said}, "conversation")), set()
    choices = fields.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadRowError(
            "has neither a `conversation`, as the replies of a run, nor `choices` with `turns`, as "
            f"FastChat's answers; its columns: {shortened(fields)}"
        )
    return (_id(fields, "question_id"), _texts(choices[0], "turns")), set()


def _id(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise BadRowError(f"`{name}` is {kind(value)}, not a number or a name")
    return str(value)


def _texts(fields: dict[str, Any], name: str) -> list[str]:
    values = fields.get(name)
    if not isinstance(values, list):
        raise BadRowError(f"`{name}` is {kind(values)}, not a list of texts")
    places = {f"{name}[{index}]": value for index, value in enumerate(values)}
    return [text_of(places, place, may_be_empty=True) for place in places]


def _refuse_doubles(names: list[str], path: str) -> None:
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"{path} has several rows of {', '.join(doubles[:5])}; keep one of each")
