"""How a guard is asked and how its answer is read: data, one YAML file a family of guards."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints

import yaml

from fedsafe.types import Role

Loader = Literal["causal", "image_text", "classifier"]
ContentType = Literal["text", "parts"]
LabelTokens = Literal["single", "first"]


@dataclass(frozen=True)
class Question:
    """How a guard is asked about conversations that end with one role, and how it answers.

    Attributes:
        labels: What the guard writes, with its share of unsafe: ``{safe: 0, unsafe: 1}``; a level
            in between may count in part. For a classifier, names of its classes.
        opening: What the guard writes before the label, such as two line ends.
        ending: What the prompt ends with; added where the template leaves it out.
        template_options: Named values for the template, such as `add_generation_prompt`, true
            unless it is set here.
        pattern: Regular expression with a group `label` (and perhaps `categories`), for guards
            whose label does not come first: the answer is then generated and searched.
        empty_answer: Whether an empty answer follows the user's turn, for templates that expect
            one.
    """

    labels: dict[str, float]
    opening: str = ""
    ending: str = ""
    template_options: dict[str, Any] = field(default_factory=dict)
    pattern: str | None = None
    empty_answer: bool = False


@dataclass(frozen=True)
class Categories:
    """The kinds of harm that a guard names after the label `unsafe`.

    Attributes:
        codes: What the guard writes, with its meaning.
        separator: What stands between the label and the codes.
        in_label: Whether the label itself holds the code, as `<UNSAFE-S4>` does; nothing follows.
        option: Name under which the template takes other categories; None if they are fixed.
        exclude_option: Name under which the template takes codes to leave out; None if it does not.
        max_tokens: Tokens at which the list of codes is cut off.
    """

    codes: dict[str, str]
    separator: str = "\n"
    in_label: bool = False
    option: str | None = None
    exclude_option: str | None = None
    max_tokens: int = 24


@dataclass(frozen=True)
class GuardFormat:
    """A family of guards.

    Attributes:
        name: Such as `llama-guard-3-8b`.
        model: Hub name of the published checkpoint.
        loader: `causal` language model, `image_text` model (asked about text alone), or sequence
            `classifier`.
        user: How it is asked about a user's turn; None if it cannot be.
        assistant: How it is asked about an answer in its conversation; None if it cannot be.
        template: Jinja template of the prompt; None takes the checkpoint's own chat template.
        content: Whether the template takes the content of a turn as text or as a list of parts.
        history: Whether the guard is shown turns before the last exchange.
        label_tokens: Whether each label must be one token (`single`), or is told by its `first`.
        categories: The kinds of harm it names; None if it names none.
        risks: Template options of each risk that is asked about apart, by its name; the verdict is
            that of the likeliest one. Empty asks once.
    """

    name: str
    model: str
    loader: Loader
    user: Question | None = None
    assistant: Question | None = None
    template: str | None = None
    content: ContentType = "text"
    history: bool = True
    label_tokens: LabelTokens = "single"
    categories: Categories | None = None
    risks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def question(self, role: Role) -> Question:
        """How the guard is asked about conversations that end with a role.

        Raises:
            ValueError: If it cannot judge that role.
        """
        asked = {"user": self.user, "assistant": self.assistant}.get(role)
        if asked is None:
            roles = [name for name in ("user", "assistant") if getattr(self, name)]
            raise ValueError(
                f"{self.name} cannot judge a conversation that ends with the {role}'s turn, only "
                f"with the {' or '.join(roles)}'s; change the part that is judged, or the guard"
            )
        return asked

    def category_options(
        self, categories: Mapping[str, str] | None, excluded: Sequence[str]
    ) -> dict[str, Any]:
        """Template options that change the guard's categories.

        Args:
            categories: Kinds of harm in place of the guard's own, code to description; None keeps
                them.
            excluded: Codes to leave out.

        Raises:
            ValueError: If the guard's categories cannot be changed so.
        """
        known = self.categories
        options: dict[str, Any] = {}
        if categories:
            if known is None or known.option is None:
                raise ValueError(
                    f"{self.name} takes no categories of one's own ({', '.join(categories)}); "
                    "leave `categories` out, or take a guard whose format names an `option` for "
                    "them"
                )
            options[known.option] = dict(categories)
        if excluded:
            if known is None or known.exclude_option is None:
                raise ValueError(
                    f"{self.name} cannot leave categories out ({', '.join(excluded)}); leave "
                    "`excluded_categories` out, or take a guard whose format names an "
                    "`exclude_option`"
                )
            codes = categories or known.codes
            if unknown := [code for code in excluded if code not in codes]:
                raise ValueError(
                    f"{self.name} has no category {', '.join(unknown)} to leave out; its codes "
                    f"are {', '.join(codes)}"
                )
            options[known.exclude_option] = list(excluded)
        return options


def load_format(name: str) -> GuardFormat:
    """Read a format: the name of a shipped one, or the path of a YAML file.

    Raises:
        ValueError: If there is no such format, or something in it is wrong.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"the guard format {name} is missing; give the path of a YAML file")
        text = path.read_text(encoding="utf-8")
    else:
        if name not in shipped_formats():
            raise ValueError(
                f"there is no guard format {name!r}; shipped are {', '.join(shipped_formats())}; "
                "one of your own is given as the path of its .yaml file"
            )
        path = Path(f"{name}.yaml")
        text = files("fedsafe.safety").joinpath("guards", path.name).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from error
    return _read_format(values, name=path.stem, where=path.name)


def shipped_formats() -> list[str]:
    """Names of the formats that come with the package."""
    folder = files("fedsafe.safety").joinpath("guards")
    return sorted(Path(each.name).stem for each in folder.iterdir() if each.name.endswith(".yaml"))


def _read_format(values: object, *, name: str, where: str) -> GuardFormat:
    given = _checked(GuardFormat, values, where=where, without="name")
    for role in ("user", "assistant"):
        if given.get(role) is not None:
            needs_safe = given.get("loader") != "classifier"
            place = f"{where}, {role}"
            given[role] = _read_question(given[role], where=place, needs_safe=needs_safe)
    if given.get("assistant") is not None and given["assistant"].empty_answer:
        raise ValueError(f"{where}, assistant: `empty_answer` is for a user's turn; leave it out")
    if given.get("categories") is not None:
        given["categories"] = _read_categories(given["categories"], where=f"{where}, categories")
    format_ = GuardFormat(name=name, **given)
    if format_.user is None and format_.assistant is None:
        raise ValueError(f"{where} has neither `user` nor `assistant`; say what the guard judges")
    if format_.loader == "classifier":
        _check_classifier(format_, where)
    return format_


def _read_question(values: object, *, where: str, needs_safe: bool) -> Question:
    question = Question(**_checked(Question, values, where=where))
    weights = _weights(question.labels, where=where, needs_safe=needs_safe)
    if question.pattern is not None:
        _check_pattern(question.pattern, where=where)
    return Question(**{**vars(question), "labels": weights})


def _read_categories(values: object, *, where: str) -> Categories:
    categories = Categories(**_checked(Categories, values, where=where))
    if not categories.codes:
        raise ValueError(f"{where} has no codes; write what the guard names, or leave it out")
    for code in categories.codes:
        _check_text(code, what=f"{where}: the code")
    return categories


def _check_text(name: object, *, what: str) -> None:
    if not isinstance(name, str):
        # YAML reads a bare Yes, No, on and off as truth values, and digits as a number.
        raise ValueError(f"{what} {name!r} is not text; put it in quotes")


def _weights(labels: Mapping[Any, Any], *, where: str, needs_safe: bool) -> dict[str, float]:
    if not labels:
        raise ValueError(f"{where} has no labels; write what the guard answers, such as safe: 0")
    for label, weight in labels.items():
        _check_text(label, what=f"{where}: the label")
        if type(weight) not in (int, float) or not 0 <= weight <= 1:
            raise ValueError(
                f"{where}: the label {label!r} has weight {weight!r}; give its share of unsafe, "
                "a number from 0 to 1"
            )
    # a classifier of several kinds of harm has no class for the absence of all
    extremes = ((0, "safe"), (1, "unsafe")) if needs_safe else ((1, "unsafe"),)
    for extreme, meaning in extremes:
        if extreme not in labels.values():
            raise ValueError(
                f"{where} has no label with weight {extreme}, so nothing is {meaning}; its labels "
                f"are {', '.join(f'{label}: {weight}' for label, weight in labels.items())}"
            )
    return {label: float(weight) for label, weight in labels.items()}


def _check_pattern(pattern: str, *, where: str) -> None:
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"{where}: pattern is no regular expression: {error}") from error
    if "label" not in groups:
        raise ValueError(
            f"{where}: pattern {pattern!r} has no group `label`; write (?P<label>…) around it"
        )


def _check_classifier(format_: GuardFormat, where: str) -> None:
    for role in ("user", "assistant"):
        question: Question | None = getattr(format_, role)
        if question is not None and (question.opening or question.pattern):
            raise ValueError(
                f"{where}, {role}: a classifier writes nothing, so `opening` and `pattern` have no "
                "effect; leave them out"
            )


def _checked(kind: type, values: object, *, where: str, without: str = "") -> dict[str, Any]:
    """The values of a dataclass, as YAML gives them, with known names and of the right types."""
    known = {each.name: each for each in fields(kind) if each.name != without}
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a mapping; its keys are {', '.join(known)}")
    for name in values.keys() - known.keys():
        close = get_close_matches(str(name), known, n=1)
        hint = f"; did you mean `{close[0]}`" if close else ""
        raise ValueError(f"{where} has an unknown key `{name}`{hint}. Known are {', '.join(known)}")
    types = get_type_hints(kind)
    for name, each in known.items():
        if name not in values:
            if each.default is MISSING and each.default_factory is MISSING:
                raise ValueError(f"{where} has no `{name}`")
            continue
        _check_type(values[name], types[name], where=f"{where}: `{name}`")
    return cast(dict[str, Any], dict(values))


def _check_type(value: object, expected: Any, *, where: str) -> None:
    choices = get_args(expected)
    if all(isinstance(choice, str) for choice in choices) and choices:
        if value not in choices:
            raise ValueError(f"{where} is {value!r}; choose {' or '.join(choices)}")
        return
    names = {str: "text", bool: "true or false", int: "a whole number", dict: "a mapping"}
    options = choices if type(None) in choices else (expected,)
    plain = [getattr(option, "__origin__", option) for option in options]
    # Nested dataclasses are mappings still.
    plain = [dict if kind in (Question, Categories) else kind for kind in plain]
    if type(value) not in plain:
        wanted = next(kind for kind in plain if kind is not type(None))
        raise ValueError(f"{where} is {value!r}; it must be {names[wanted]}")
