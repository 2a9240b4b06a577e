"""What the facts of each letter say, checked where they arrive."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_type_hints

from fedsafe.federated.remote.letter import Letter

HELLO = "hello"
VISIT = "visit"
FAILURE = "failure"

Encoding = Literal["float32", "bfloat16"]
"""How the values of an adapter travel."""


@dataclass(frozen=True)
class Facts:
    """Facts of one kind of letter."""

    kind = ""

    def letter(self, tensors: bytes = b"") -> Letter:
        """These facts, and tensors, as a letter."""
        return Letter({"kind": self.kind, **asdict(self)}, tensors)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Self:
        """Check what arrived.

        Raises:
            ValueError: If the letter is of another kind, a fact is missing or unknown, or is of
                another type.
        """
        if facts.get("kind") != cls.kind:
            raise ValueError(f"the letter is of kind {facts.get('kind')!r}; expected {cls.kind!r}")
        given = {name: value for name, value in facts.items() if name != "kind"}
        known = [field.name for field in fields(cls)]
        if given.keys() != set(known):
            raise ValueError(
                f"a letter of kind {cls.kind!r} has the facts {', '.join(known)}; got "
                f"{', '.join(sorted(given)) or 'none'}"
            )
        hints = get_type_hints(cls)
        for name, value in given.items():
            if not _fits(value, hints[name]):
                raise ValueError(
                    f"{name} of a letter of kind {cls.kind!r} is a {type(value).__name__}; "
                    f"expected {getattr(hints[name], '__name__', hints[name])}"
                )
        return cls(**given)


@dataclass(frozen=True)
class Greeting(Facts):
    """The server asks a node who it is."""

    kind = HELLO
    run: str
    """Random name of the run."""


@dataclass(frozen=True)
class NodeFacts(Facts):
    """A node says who it is and what it holds, in numbers."""

    kind = HELLO
    run: str
    client: str
    """Its name."""
    num_samples: int
    """Samples that it trains on, after its filter and what it holds out."""
    num_answer_tokens: int
    """Answer tokens of those."""
    filtered: dict[str, int]
    """How many samples its guard judged, and what became of them; empty without a filter."""
    settings: dict[str, Any]
    """The settings that all must share, by name."""
    versions: dict[str, str]
    """Versions of fedsafe and of the libraries that training depends on."""


@dataclass(frozen=True)
class VisitOrder(Facts):
    """The server asks a node to train; the adapter travels with it."""

    kind = VISIT
    run: str
    ticket: str
    """Random; the report repeats it."""
    round: int
    """From 0."""
    num_rounds: int
    client: int
    """The node's number in the federation, from 0; decides its random draws."""
    name: str
    """Its name."""
    number: int
    """Place of the visit among those of the round, from 0."""
    encoding: str
    """How values travel, both ways."""
    validate: bool
    """Whether to measure the adapter on the samples held out, before training."""


@dataclass(frozen=True)
class VisitReport(Facts):
    """A node gives its trained adapter back."""

    kind = VISIT
    run: str
    ticket: str
    round: int
    client: int
    name: str
    loss: float
    """Mean over the answer tokens trained on, nats."""
    num_steps: int
    num_tokens: int
    """Answer tokens trained on."""
    num_samples: int
    """Samples that it holds for training."""
    num_answer_tokens: int
    """Answer tokens of those."""
    seconds: float
    """Time that the training took."""
    start_nll: float
    """Loss of the adapter that was sent on the samples held out: a sum over answer tokens, nats."""
    start_tokens: int
    """Answer tokens of those; 0 where none are held out."""


@dataclass(frozen=True)
class Failure(Facts):
    """A node could not do what it was asked; its own log says why."""

    kind = FAILURE
    error: str
    """Kind of the error, such as `ValueError`. Its text may quote a sample and stays at home."""


def _fits(value: Any, hint: Any) -> bool:
    origin = getattr(hint, "__origin__", hint)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin)
