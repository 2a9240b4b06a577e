"""What a guard has written: its label and the kinds of harm it names. Pure functions."""

import re
from typing import NamedTuple

from fedsafe.safety.guard_format import Categories, Question


class Answer(NamedTuple):
    """What a guard has written."""

    label: str
    """One of the question's labels."""
    categories: str
    """The text that may name kinds of harm, for `parse_codes`."""


def parse_answer(question: Question, text: str) -> Answer:
    """Find the label in an answer.

    The question's pattern finds it anywhere; without one the answer begins with it, after the
    opening and white space.

    Raises:
        ValueError: If there is no label. A guard repeats what it judges, so the message holds
            nothing of the text.
    """
    if question.pattern is not None:
        found = re.search(question.pattern, text)
        label = found["label"] if found else None
        if found and label in question.labels:
            return Answer(label, found.groupdict().get("categories") or "")
    else:
        start = text.lstrip().removeprefix(question.opening.strip()).lstrip()
        # Longest first: a label may begin with another.
        for label in sorted(question.labels, key=len, reverse=True):
            if start.startswith(label.strip()):
                return Answer(label, start[len(label.strip()) :])
    raise ValueError(
        f"the guard's answer of {len(text)} characters has none of the labels "
        f"{', '.join(map(repr, question.labels))}"
        + (f" where the pattern {question.pattern!r} looks" if question.pattern else " first")
        + "; the template or the format may not be this guard's, or its answer was cut off"
    )


def parse_codes(categories: Categories, text: str) -> tuple[str, ...]:
    """The kinds of harm that a text names, each once, in its order.

    Only the known codes count, as whole words: `S1` is not in `S10`.

    Args:
        categories: The codes that the guard was given.
        text: What it wrote after its label, or the label itself where that holds the code.
    """
    longest_first = sorted(categories.codes, key=len, reverse=True)
    known = "|".join(re.escape(code) for code in longest_first)
    return tuple(dict.fromkeys(re.findall(rf"(?<!\w)(?:{known})(?!\w)", text)))
