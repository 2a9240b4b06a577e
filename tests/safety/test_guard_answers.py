import pytest

from fedsafe.safety.guard_answers import parse_answer, parse_codes
from fedsafe.safety.guard_format import Categories, Question, load_format
from fedsafe.types import Role


@pytest.mark.parametrize(
    ("guard", "role", "text", "label", "codes"),
    [
        pytest.param("llama-guard-3-8b", "user", "\n\nsafe", "safe", (), id="llama-safe"),
        pytest.param(
            "llama-guard-3-8b",
            "user",
            "\n\nunsafe\nS10,S2",
            "unsafe",
            ("S10", "S2"),
            id="llama-unsafe",
        ),
        pytest.param("llama-guard-3-1b", "user", "unsafe\nS1", "unsafe", ("S1",), id="llama-1b"),
        pytest.param(
            "qwen3guard-gen",
            "assistant",
            "Safety: Unsafe\nCategories: Non-violent Illegal Acts, PII\nRefusal: No",
            " Unsafe",
            ("Non-violent Illegal Acts", "PII"),
            id="qwen-unsafe",
        ),
        pytest.param(
            "qwen3guard-gen",
            "user",
            "Safety: Controversial\nCategories: Unethical Acts",
            " Controversial",
            ("Unethical Acts",),
            id="qwen-controversial",
        ),
        pytest.param(
            "qwen3guard-gen", "user", "Safety: Safe\nCategories: None", " Safe", (), id="qwen-safe"
        ),
        pytest.param(
            "kanana-safeguard", "user", "<UNSAFE-S4>", "<UNSAFE-S4>", ("S4",), id="kanana-unsafe"
        ),
        pytest.param("kanana-safeguard", "user", "<SAFE>", "<SAFE>", (), id="kanana-safe"),
        pytest.param("world", "user", " unsafe s3", "unsafe", ("s3",), id="world-unsafe"),
    ],
)
def test_answers_in_the_published_forms_are_read(
    guard: str, role: Role, text: str, label: str, codes: tuple[str, ...]
) -> None:
    format_ = load_format(guard)
    answer = parse_answer(format_.question(role), text)
    assert answer.label == label
    assert format_.categories is not None
    named = answer.label if format_.categories.in_label else answer.categories
    assert parse_codes(format_.categories, named) == codes


THREE_LINES = "Harmful request: yes\nResponse refusal: yes\nHarmful response: no"


@pytest.mark.parametrize(
    ("guard", "role", "text", "label"),
    [
        pytest.param("wildguard", "user", THREE_LINES, "yes", id="wildguard-prompt"),
        pytest.param("wildguard", "assistant", THREE_LINES, "no", id="wildguard-answer"),
        pytest.param("granite-guardian", "user", "Yes", "Yes", id="granite"),
        pytest.param(
            "granite-guardian",
            "user",
            "No\n<confidence> High </confidence>",
            "No",
            id="granite-confidence",
        ),
        pytest.param(
            "granite-guardian-3.3",
            "user",
            "<think>\n</think>\n<score> yes </score>",
            "yes",
            id="granite-score",
        ),
        pytest.param("granite-guardian-3.3", "user", "<score>no</score>", "no", id="granite-tight"),
        pytest.param("shieldgemma", "user", "No", "No", id="shieldgemma"),
    ],
)
def test_each_roles_own_line_is_read(guard: str, role: Role, text: str, label: str) -> None:
    assert parse_answer(load_format(guard).question(role), text).label == label


def test_a_pattern_may_find_the_categories_too() -> None:
    question = Question(
        labels={"ok": 0, "bad": 1}, pattern=r"verdict (?P<label>ok|bad)(?: for (?P<categories>.*))?"
    )
    assert parse_answer(question, "my verdict bad for A, B") == ("bad", "A, B")
    assert parse_answer(question, "my verdict ok") == ("ok", "")


def test_the_longest_label_that_fits_is_taken() -> None:
    question = Question(labels={"no": 0, "no way": 1})
    assert parse_answer(question, "no way").label == "no way"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        pytest.param(
            Question(labels={"safe": 0, "unsafe": 1}), "'safe', 'unsafe' first", id="label-first"
        ),
        pytest.param(
            Question(labels={"no": 0, "yes": 1}, pattern="score (?P<label>yes|no)"),
            r"'no', 'yes' where the pattern 'score .*' looks",
            id="pattern",
        ),
        pytest.param(
            Question(labels={"no": 0, "yes": 1}, pattern="(?P<label>marzipan)"),
            "'no', 'yes'",
            id="found-but-unknown",
        ),
    ],
)
def test_an_answer_without_a_label_is_refused_without_its_text(
    question: Question, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_answer(question, "I like marzipan")
    assert "marzipan" not in str(caught.value).replace("(?P<label>marzipan)", "")
    assert "15 characters" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        pytest.param("S10", ("S10",), id="not-the-shorter"),
        pytest.param("S1,S10, S1", ("S1", "S10"), id="each-once"),
        pytest.param("S1S10 XS1", (), id="whole-words"),
        pytest.param("S99 s1", (), id="unknown"),
        pytest.param("", (), id="none"),
        pytest.param("a.b and axb", ("a.b",), id="no-regular-expression"),
    ],
)
def test_only_known_codes_count(text: str, codes: tuple[str, ...]) -> None:
    assert parse_codes(Categories({"S1": "", "S10": "", "a.b": ""}), text) == codes
