import pytest

from fedsafe.safety.refusal_openings import common_openings, opens_with


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot help with that",
        "  i   CANNOT",
        "I'm sorry, but no",
        "I\N{RIGHT SINGLE QUOTATION MARK}m sorry",
        "Sorry. No.",
        "As an AI-based helper, I",
    ],
)
def test_a_common_refusal_is_one_whatever_its_case_spaces_and_apostrophes(answer: str) -> None:
    assert opens_with(answer, common_openings())


@pytest.mark.parametrize(
    "answer",
    ["", "Sure, sorry to be late", "As an aid, take a stick", "As an airline would", "Sorrys", "i"],
)
def test_another_answer_is_none(answer: str) -> None:
    assert not opens_with(answer, common_openings())


def test_an_opening_ends_where_its_last_word_does() -> None:
    assert opens_with("I can, of course", ["i can"])
    assert not opens_with("I can't", ["i can"])
    assert opens_with("I can", ["i can"])


def test_an_opening_of_another_script_or_with_a_comma_may_be_followed_by_anything() -> None:
    assert opens_with("죄송합니다만", ["죄송"])
    assert opens_with("no,never", ["no,"])


def test_no_openings_open_nothing() -> None:
    assert not opens_with("i cannot", [])


def test_common_openings_are_lower_case_and_never_empty() -> None:
    openings = common_openings()
    assert len(openings) > 10
    assert all(opening and opening == opening.strip().lower() for opening in openings)
