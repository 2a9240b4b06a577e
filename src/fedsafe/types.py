"""The nouns that every floor shares; this module imports nothing of fedsafe."""

from typing import Literal, NamedTuple, TypedDict

Role = Literal["system", "user", "assistant"]
Label = Literal["safe", "unsafe"]
JudgedPart = Literal["pair", "prompt", "response"]
"""What of a sample a guard is shown: all of it, all but the answer, or the answer alone."""


class Turn(TypedDict):
    """One turn of a conversation, in the `messages` format of the datasets/TRL ecosystem."""

    role: Role
    content: str


Conversation = list[Turn]


class Sample(TypedDict):
    """One training conversation of one client, as every reader yields it.

    The columns of the dataset that `data.sources.load_samples` returns.
    """

    messages: Conversation
    """The turns; the last one is the assistant's."""
    client: str | None
    """Name of the client the sample belongs to, where the source says so (natural partition)."""
    label: Label | None
    """Ground truth, used only to measure and to print the harmful share."""
    category: str | None
    """Topic or harm category, used by the Dirichlet partition."""
    source: str
    """File or hub name the sample came from."""
    row: int
    """Line (JSONL, CSV; from 1) or row (from 0) in the source, for error messages."""


class RedTeamPrompt(NamedTuple):
    """What the server asks the model in order to see it answer badly."""

    messages: Conversation
    """Ends with the user's turn."""
    response: str | None
    """A red response to revise; None where the model is to give one."""
    source: str
    """File or hub name that it came from."""
    row: int
    """Line (JSONL, CSV; from 1) or row (from 0) in the source."""


class PreferencePair(NamedTuple):
    """A better and a worse answer to one prompt."""

    prompt: Conversation
    """Ends with the user's turn."""
    chosen: str
    """The better answer; in constitutional training the revised response."""
    rejected: str | None
    """The worse answer, the red response; None where there is only a good one, for SFT alone."""
    source: str
    """File or hub name that it came from; `round 3` where the server made it."""
    row: int
    """Line (JSONL, CSV; from 1) or row (from 0) in the source."""


class TokenizedConversation(NamedTuple):
    """Token ids of one conversation and which of them the loss is computed on."""

    input_ids: list[int]
    answer_mask: list[bool]
    """True where the token was written by the assistant; same length as `input_ids`."""


class Verdict(NamedTuple):
    """What a guard says of one conversation."""

    unsafe: float
    """Probability that it is unsafe, 0 to 1."""
    categories: tuple[str, ...]
    """Kinds of harm that the guard names, such as `S1`; none of a safe conversation."""
    guard: str
    """Name of the guard."""
    shortened: bool = False
    """Whether the guard saw its beginning and end only, because its window is too short."""
