"""A constitution: principles by which a model criticises and revises its own answers.

References:
    Bai et al. (2022), Constitutional AI: Harmlessness from AI Feedback, section 3 and appendix C.
    https://arxiv.org/abs/2212.08073
"""

import hashlib
import json
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fedsafe.safety.refusal_openings import normal_opening


class Principle(NamedTuple):
    """One principle."""

    name: str
    critique_request: str
    """Asks the model to criticise its last answer by this principle."""
    revision_request: str
    """Asks it to write the answer anew."""


class Gate(NamedTuple):
    """How the critic is asked whether a revised answer is still harmful.

    A reply that begins in no way of `flagged` lets the answer pass, whether it says no or neither
    yes nor no.
    """

    request: str | None
    """The question that follows the prompt and the revised answer; None takes the critique request
    of the last principle."""
    flagged: tuple[str, ...]
    """How a reply begins that says it is, as `normal_opening` gives it."""


@dataclass(frozen=True)
class Constitution:
    """Named principles.

    Attributes:
        name: Name, for records.
        principles: One or more, each with a name of its own.
        gate: The question about revised answers; None asks none.
        digest: Changes whenever the words do.
    """

    name: str
    principles: tuple[Principle, ...]
    gate: Gate | None
    digest: str


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice; of two principles run together YAML keeps one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for (key, _), name in zip(node.value, keys, strict=True):
            if keys.count(name) > 1:
                problem = f"`{name}` occurs twice; keep one, or begin a principle with a dash"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def load_constitution(name: str) -> Constitution:
    """Read and check a constitution.

    Args:
        name: One of fedsafe's own (`default`), or the path of a YAML file.

    Raises:
        ValueError: If there is none of that name, or it is empty, misspelt or incomplete; says
            where.
    """
    try:
        values = yaml.load(_text(name), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read as YAML: {error}") from error
    given = _mapping(values, ("name", "principles", "gate"), where=name)
    title = _required_text(given, "name", where=name)
    principles = _principles(given.get("principles"), where=name)
    gate = _gate(given["gate"], where=f"{name}, gate") if "gate" in given else None
    digest = hashlib.sha256(json.dumps([principles, gate]).encode()).hexdigest()
    return Constitution(title, principles, gate, digest)


def shipped_constitutions() -> list[str]:
    """Names of the constitutions that come with the package."""
    folder = files("fedsafe.safety").joinpath("constitutions")
    return sorted(Path(each.name).stem for each in folder.iterdir() if each.name.endswith(".yaml"))


def _text(name: str) -> str:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"the constitution {name} is missing; give the path of a YAML file")
        return path.read_text(encoding="utf-8")
    if name not in shipped_constitutions():
        raise ValueError(
            f"there is no constitution {name!r}; shipped are {', '.join(shipped_constitutions())}; "
            "one of your own is given as the path of its .yaml file"
        )
    folder = files("fedsafe.safety").joinpath("constitutions")
    return folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _principles(values: object, *, where: str) -> tuple[Principle, ...]:
    if not values:
        raise ValueError(f"{where} has no principles; list at least one under `principles`")
    if not isinstance(values, list):
        raise ValueError(
            f"{where}: `principles` is {_kind(values)}; write a list, a `- name: …` for each"
        )
    principles: dict[str, Principle] = {}
    for number, value in enumerate(values, start=1):
        principle = _principle(value, where=f"{where}, principle {number}")
        if principle.name in principles:
            raise ValueError(
                f"{where}, principle {number} has the name {principle.name!r} of an earlier one; "
                "give it another"
            )
        principles[principle.name] = principle
    return tuple(principles.values())


def _principle(value: object, *, where: str) -> Principle:
    given = _mapping(value, Principle._fields, where=where)
    if isinstance(given.get("name"), str):
        where = f"{where} ({given['name']})"
    return Principle(*(_required_text(given, name, where=where) for name in Principle._fields))


def _gate(value: object, *, where: str) -> Gate:
    given = _mapping(value, Gate._fields, where=where)
    request = given.get("request")
    if request is not None:
        request = _required_text(given, "request", where=where)
    flagged = given.get("flagged")
    if not flagged:
        raise ValueError(f"{where} has no `flagged`; list how a reply begins that finds harm")
    if not isinstance(flagged, list):
        raise ValueError(f'{where}: `flagged` is {_kind(flagged)}; write a list, such as ["yes"]')
    texts = [_checked_text(each, what=f"{where}: `flagged`") for each in flagged]
    return Gate(request, tuple(map(normal_opening, texts)))


def _mapping(values: object, known: tuple[str, ...], *, where: str) -> dict[str, Any]:
    if values is None:
        raise ValueError(f"{where} is empty; its keys are {', '.join(known)}")
    if not isinstance(values, dict):
        raise ValueError(
            f"{where} is {_kind(values)}, not a mapping; its keys are {', '.join(known)}"
        )
    for name in values:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean `{close[0]}`" if close else ""
            raise ValueError(
                f"{where} has an unknown key `{name}`{hint}. Known are {', '.join(known)}"
            )
    return values


def _required_text(given: dict[str, Any], name: str, *, where: str) -> str:
    if given.get(name) is None:
        raise ValueError(f"{where} has no `{name}`; add it")
    return _checked_text(given[name], what=f"{where}: `{name}`")


def _checked_text(value: object, *, what: str) -> str:
    if not isinstance(value, str):
        # YAML reads a bare yes, no, on and off as truth values, and digits as a number.
        raise ValueError(f"{what} is {value!r}, not text; put it in quotes")
    if not value.strip():
        raise ValueError(f"{what} is empty; write something")
    return value.strip()


def _kind(value: object) -> str:
    return "text" if isinstance(value, str) else f"a {type(value).__name__}"
