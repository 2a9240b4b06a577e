from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsafe.safety import guard_format
from fedsafe.safety.guard_format import GuardFormat, load_format, shipped_formats
from fedsafe.world.grammar import load_grammar

GUARDS = Path(guard_format.__file__).with_name("guards")
QUESTION: dict[str, Any] = {"labels": {"fine": 0, "foul": 1}}
FORMAT: dict[str, Any] = {"model": "someone/guard", "loader": "causal", "user": QUESTION}


def written(folder: Path, **changes: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(FORMAT | changes, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("name", shipped_formats())
def test_every_shipped_format_is_right_and_says_what_it_is(name: str) -> None:
    format_ = load_format(name)
    assert format_.name == name
    assert format_.user or format_.assistant
    assert (GUARDS / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize(
    ("name", "count", "role"),
    [
        pytest.param("llama-guard-3-8b", 14, "assistant", id="llama-guard-3-8b"),
        pytest.param("llama-guard-3-1b", 13, "assistant", id="llama-guard-3-1b"),
        pytest.param("qwen3guard-gen", 9, "user", id="qwen3guard-gen"),
        pytest.param("kanana-safeguard", 7, "user", id="kanana-safeguard"),
    ],
)
def test_guards_name_their_published_number_of_categories(name: str, count: int, role: Any) -> None:
    categories = load_format(name).categories
    assert categories is not None
    assert len(categories.codes) == count
    assert max(load_format(name).question(role).labels.values()) == 1


def test_the_worlds_categories_are_those_of_its_grammar_in_order() -> None:
    categories = load_format("world").categories
    assert categories is not None
    assert tuple(categories.codes.values()) == load_grammar().categories
    assert list(categories.codes) == ["s1", "s2", "s3", "s4", "s5", "s6"]


def test_a_format_of_ones_own_is_read_from_its_path(tmp_path: Path) -> None:
    path = written(tmp_path, categories={"codes": {"A": "anger"}}, history=False)
    format_ = load_format(path)
    assert isinstance(format_, GuardFormat)
    assert (format_.name, format_.model, format_.history) == ("mine", "someone/guard", False)
    assert format_.user is not None
    assert format_.user.labels == {"fine": 0.0, "foul": 1.0}
    assert format_.assistant is None
    assert format_.categories is not None
    assert format_.categories.codes == {"A": "anger"}


def test_a_role_that_the_guard_cannot_judge_is_refused(tmp_path: Path) -> None:
    format_ = load_format(written(tmp_path))
    assert format_.question("user").labels == {"fine": 0.0, "foul": 1.0}
    with pytest.raises(
        ValueError, match=r"mine cannot judge .* the assistant's turn, only with the"
    ):
        format_.question("assistant")


def question(**changes: Any) -> dict[str, Any]:
    return {"user": QUESTION | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"modle": "x"}, "unknown key `modle`; did you mean `model`.", id="typo"),
        pytest.param(
            question(opning="x"),
            r"mine.yaml, user has an unknown key `opning`; did you mean `opening`\.",
            id="typo-in-question",
        ),
        pytest.param(
            {"categories": {"codes": {"A": "a"}, "seperator": ","}},
            "mine.yaml, categories .* did you mean `separator`",
            id="typo-in-categories",
        ),
        pytest.param(
            {"categories": {"codes": {}}}, "mine.yaml, categories has no codes", id="no-codes"
        ),
        pytest.param(
            {"categories": {"codes": {1: "x"}}}, "code 1 is not text; put it", id="code-no-text"
        ),
        pytest.param({"name": "other"}, "unknown key `name`", id="name-is-the-file's"),
        pytest.param({"user": None}, "neither `user` nor `assistant`", id="judges-nothing"),
        pytest.param({"loader": "magic"}, "`loader` is 'magic'; choose causal or", id="loader"),
        pytest.param(
            {"history": "no"}, "`history` is 'no'; it must be true or", id="no-truth-value"
        ),
        pytest.param({"template": 3}, "`template` is 3; it must be text", id="no-text"),
        pytest.param({"user": "safe"}, "`user` is 'safe'; it must be a mapping", id="no-mapping"),
        pytest.param({"user": {}}, "mine.yaml, user has no `labels`", id="labels-missing"),
        pytest.param(question(labels={}), "user has no labels; write what", id="no-labels"),
        pytest.param(question(labels={True: 1, "no": 0}), "label True is not text", id="bare-yes"),
        pytest.param(
            question(labels={"fine": 0, "foul": 1.5}),
            "label 'foul' has weight 1.5; .* from 0 to 1",
            id="weight-above-1",
        ),
        pytest.param(
            question(labels={"fine": 0, "foul": float("nan")}), "has weight nan", id="weight-nan"
        ),
        pytest.param(
            question(labels={"fine": False, "foul": 1}), "has weight False", id="weight-truth"
        ),
        pytest.param(
            question(labels={"meh": 0.5, "foul": 1}),
            "no label with weight 0, so nothing is safe; its labels are meh: 0.5",
            id="never-safe",
        ),
        pytest.param(
            question(labels={"fine": 0, "meh": 0.5}), "no label with weight 1", id="never-unsafe"
        ),
        pytest.param(question(pattern="(fine|foul)"), "has no group `label`", id="no-group"),
        pytest.param(question(pattern="(?P<label>"), "no regular expression", id="broken-pattern"),
        pytest.param(
            {"loader": "classifier"} | question(opening="x"),
            "a classifier writes nothing, so `opening`",
            id="classifier-with-opening",
        ),
        pytest.param(
            {"assistant": QUESTION | {"empty_answer": True}},
            "`empty_answer` is for a user's turn",
            id="empty-answer-after-answer",
        ),
    ],
)
def test_what_is_wrong_in_a_format_is_said(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_format(written(tmp_path, **changes))


def test_a_missing_model_is_said(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"loader": "causal", "user": QUESTION}))
    with pytest.raises(ValueError, match=r"mine.yaml has no `model`"):
        load_format(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("- a\n", "mine.yaml is not a mapping; its keys are model", id="list"),
        pytest.param("", "mine.yaml is not a mapping", id="empty"),
        pytest.param("a: [", "mine.yaml is not YAML", id="broken"),
    ],
)
def test_a_file_that_holds_no_format_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_format(str(path))


def test_an_unknown_format_lists_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=r"no guard format 'llama-gard'; shipped are .*wildguard"):
        load_format("llama-gard")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"guard format .*absent.yaml is missing"):
        load_format(str(tmp_path / "absent.yaml"))
