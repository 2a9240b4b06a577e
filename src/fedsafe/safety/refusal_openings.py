"""How refusals begin."""

import re
from collections.abc import Sequence
from importlib import resources

_APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"


def opens_with(answer: str, openings: Sequence[str]) -> bool:
    """Whether an answer begins with one of the openings, case and spaces aside.

    An opening that ends in a Latin letter or a digit ends there: `as an ai` does not open `as an
    aid`, nor `i can` `i can't`. Other scripts, which append endings, go on as they like.
    """
    text = " ".join(answer.lower().replace(_APOSTROPHE, "'").split())
    return any(
        text.startswith(opening) and not _is_within_word(text, len(opening)) for opening in openings
    )


def common_openings() -> list[str]:
    """How refusals in English commonly begin, in lower case."""
    text = resources.files("fedsafe.safety").joinpath("refusal_openings.txt").read_text()
    return text.splitlines()


def _is_within_word(text: str, position: int) -> bool:
    return re.fullmatch("[a-z0-9][a-z0-9']", text[max(position - 1, 0) : position + 1]) is not None
