"""A constitution: principles by which a model criticises and revises its own answers.

References:
    Bai et al. (2022), Constitutional AI: Harmlessness from AI Feedback, section 3 and appendix C.
    https://arxiv.org/abs/2212.08073
"""

from dataclasses import dataclass
from typing import NamedTuple


class Principle(NamedTuple):
    """One principle."""

    name: str
    critique_request: str
    """Asks the model to criticise its last answer by this principle."""
    revision_request: str
    """Asks it to write the answer anew."""


class Gate(NamedTuple):
    """How the critic is asked whether a revised answer is still harmful."""

    request: str | None
    """The question that follows the prompt and the revised answer; None takes the critique request
    of the last principle."""
    flagged: tuple[str, ...]
    """How a reply begins that says it is, in lower case."""


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


def load_constitution(name: str) -> Constitution:
    """Read and check a constitution.

    Args:
        name: One of fedsafe's own (`default`), or the path of a YAML file.

    Raises:
        ValueError: If there is none of that name, or it is empty, misspelt or incomplete; says
            where.
    """
    raise NotImplementedError
