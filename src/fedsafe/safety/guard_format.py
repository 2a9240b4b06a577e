"""How a guard is asked and how its answer is read: data, one YAML file a family of guards."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Question:
    """How a guard is asked about conversations that end with one role, and how it answers.

    Attributes:
        labels: What the guard writes, with its share of unsafe: ``{safe: 0, unsafe: 1}``; a level
            in between may count in part. For a classifier, names of its classes.
        opening: What the guard writes before the label, such as two line ends.
        template_options: Named values for the template.
        pattern: Regular expression with a group `label` (and perhaps `categories`), for guards
            whose label does not come first: the answer is then generated and searched.
    """

    labels: dict[str, float]
    opening: str = ""
    template_options: dict[str, Any] = field(default_factory=dict)
    pattern: str | None = None


@dataclass(frozen=True)
class Categories:
    """The kinds of harm that a guard names after the label `unsafe`.

    Attributes:
        codes: What the guard writes, with its meaning.
        separator: What stands between the label and the codes.
        option: Name under which the template takes other categories; None if they are fixed.
        exclude_option: Name under which the template takes codes to leave out; None if it does not.
        max_tokens: Tokens at which the list of codes is cut off.
    """

    codes: dict[str, str]
    separator: str = "\n"
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
        label_tokens: Whether each label must be one token (`single`), or is told by its `first`.
        categories: The kinds of harm it names; None if it names none.
        risks: Template options of each risk that is asked about apart, by its name; the verdict is
            that of the likeliest one. Empty asks once.
    """

    name: str
    model: str
    loader: Literal["causal", "image_text", "classifier"]
    user: Question | None
    assistant: Question | None
    template: str | None = None
    content: Literal["text", "parts"] = "text"
    label_tokens: Literal["single", "first"] = "single"
    categories: Categories | None = None
    risks: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_format(name: str) -> GuardFormat:
    """Read a format: the name of a shipped one, or the path of a YAML file."""
    raise NotImplementedError
