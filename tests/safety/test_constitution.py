from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsafe.safety.constitution import Gate, load_constitution, shipped_constitutions

KIND = {"name": "kind", "critique_request": "Is it kind?", "revision_request": "Be kind."}
TRUE = {"name": "true", "critique_request": "Is it true?", "revision_request": "Be true."}
OWN: dict[str, Any] = {"name": "own", "principles": [KIND, TRUE]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in its own folder, so that files have short names."""
    monkeypatch.chdir(tmp_path)


def write(values: object) -> str:
    Path("own.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return "own.yaml"


def test_the_default_covers_18_principles_and_asks_about_the_revision() -> None:
    constitution = load_constitution("default")
    assert constitution.name == "default"
    assert len(constitution.principles) == 18
    requests = [text for each in constitution.principles for text in each[1:]]
    assert len(set(requests)) == 36
    assert all(each.revision_request.endswith("new answer.") for each in constitution.principles)
    assert constitution.gate is not None
    assert constitution.gate.flagged == ("yes",)


@pytest.mark.parametrize("name", shipped_constitutions())
def test_a_shipped_constitution_has_its_file_name_and_opens_with_a_command(name: str) -> None:
    assert load_constitution(name).name == name
    folder = Path(__file__).parents[2] / "src" / "fedsafe" / "safety" / "constitutions"
    opening = (folder / f"{name}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert "\n#   fedsafe revise " in opening


def test_a_constitution_of_ones_own_keeps_its_order_and_needs_no_gate() -> None:
    constitution = load_constitution(write(OWN))
    assert [each._asdict() for each in constitution.principles] == [KIND, TRUE]
    assert (constitution.name, constitution.gate) == ("own", None)


def test_flagged_replies_are_compared_in_lower_case_and_the_question_may_be_left_out() -> None:
    gate = {"flagged": ["Yes", "It IS harmful"]}
    assert load_constitution(write(OWN | {"gate": gate})).gate == Gate(
        None, ("yes", "it is harmful")
    )


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"principles": [KIND, TRUE | {"critique_request": "Is it so?"}]}, False),
        ({"principles": [TRUE, KIND]}, False),
        ({"gate": {"flagged": ["yes"]}}, False),
        ({"name": "other"}, True),
        ({}, True),
    ],
    ids=["a word", "the order", "a gate", "the name", "nothing"],
)
def test_the_digest_follows_the_words(change: dict[str, Any], same: bool) -> None:
    before = load_constitution(write(OWN)).digest
    assert (load_constitution(write(OWN | change)).digest == before) == same


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


WRONG: dict[str, tuple[object, str]] = {
    "empty": (None, r"own\.yaml is empty; its keys are name, principles, gate"),
    "list": ([KIND], r"own\.yaml is a list, not a mapping; its keys are name, principles, gate"),
    "text": ("be kind", r"own\.yaml is text, not a mapping"),
    "no name": (without(OWN, "name"), r"own\.yaml has no `name`; add it"),
    "no principles": ({"name": "own"}, r"own\.yaml has no principles; list at least one"),
    "principles empty": (OWN | {"principles": []}, r"own\.yaml has no principles; list at least"),
    "principles as mapping": (OWN | {"principles": KIND}, "`principles` is a dict; write a list"),
    "principle as text": (OWN | {"principles": ["be kind"]}, "principle 1 is text, not a mapping"),
    "principle empty": (OWN | {"principles": [KIND, None]}, r"own\.yaml, principle 2 is empty"),
    "no revision request": (
        OWN | {"principles": [KIND, without(TRUE, "revision_request")]},
        r"own\.yaml, principle 2 \(true\) has no `revision_request`; add it",
    ),
    "null request": (
        OWN | {"principles": [KIND | {"revision_request": None}]},
        r"principle 1 \(kind\) has no `revision_request`",
    ),
    "empty request": (
        OWN | {"principles": [KIND | {"critique_request": " "}]},
        r"principle 1 \(kind\): `critique_request` is empty; write something",
    ),
    "request type": (
        OWN | {"principles": [KIND | {"critique_request": 3}]},
        r"principle 1 \(kind\): `critique_request` is 3, not text; put it in quotes",
    ),
    "name type": (
        OWN | {"principles": [KIND | {"name": True}]},
        r"own\.yaml, principle 1: `name` is True, not text; put it in quotes",
    ),
    "name twice": (
        OWN | {"principles": [KIND, TRUE | {"name": "kind"}]},
        r"own\.yaml, principle 2 has the name 'kind' of an earlier one; give it another",
    ),
    "key misspelt": (
        OWN | {"principals": []},
        r"own\.yaml has an unknown key `principals`; did you mean `principles`\. Known",
    ),
    "request misspelt": (
        OWN | {"principles": [KIND | {"critic_request": "x"}]},
        "principle 1 has an unknown key `critic_request`; did you mean `critique_request`",
    ),
    "unknown key": (OWN | {"xyz": 1}, "unknown key `xyz`. Known are name, principles, gate"),
    "gate empty": (OWN | {"gate": None}, r"own\.yaml, gate is empty; its keys are request, flag"),
    "nothing flagged": (OWN | {"gate": {"flagged": []}}, "gate has no `flagged`; list how"),
    "no flagged": (OWN | {"gate": {"request": "Bad?"}}, "gate has no `flagged`; list how"),
    "flagged text": (OWN | {"gate": {"flagged": "yes"}}, r"`flagged` is text; write a list"),
    "flagged bare yes": (
        OWN | {"gate": {"flagged": [True]}},
        r"own\.yaml, gate: `flagged` is True, not text; put it in quotes",
    ),
    "flagged empty text": (OWN | {"gate": {"flagged": [""]}}, "gate: `flagged` is empty"),
    "gate request type": (
        OWN | {"gate": {"request": ["Bad?"], "flagged": ["yes"]}},
        r"gate: `request` is \['Bad\?'\], not text",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said_with_its_place(kind: str) -> None:
    values, message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        load_constitution(write(values))


def test_a_file_that_is_no_yaml_is_an_error() -> None:
    Path("own.yaml").write_text("principles: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.yaml cannot be read as YAML: "):
        load_constitution("own.yaml")
    Path("own.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(
        ValueError, match=r"own\.yaml cannot be read as YAML: .* codec can't decode"
    ):
        load_constitution("own.yaml")


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the constitution no\.yaml is missing; give the path"):
        load_constitution("no.yaml")


def test_an_unknown_name_is_an_error_that_names_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match="no constitution 'defalt'; shipped are default; one of"):
        load_constitution("defalt")


def test_two_principles_run_together_are_an_error() -> None:
    text = yaml.safe_dump(OWN, sort_keys=False).replace("- name: 'true'", "  name: 'true'")
    Path("own.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"`name` occurs twice; keep one, or begin a p(?s:.*)line"):
        load_constitution("own.yaml")
