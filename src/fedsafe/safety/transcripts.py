"""What became of red-team prompts: transcripts, and counts of them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from fedsafe.types import Conversation, PreferencePair, RedTeamPrompt

REASONS = {
    "unreadable": "the chat template refuses the conversation",
    "too_long": "a turn does not fit the model",
    "empty": "the response or the revision says nothing",
    "refused": "the model refused, which is no red response",
    "endless": "the length limit ended the revision",
    "unchanged": "the revision is the response",
    "unjudgeable": "the guard cannot judge the revision",
    "flagged_by_guard": "the guard calls the revision unsafe",
    "flagged_by_critic": "the critic calls the revision harmful",
}
"""Why a prompt makes no pair.

A red response that the length limit cut off is none: it is kept, and counted in `cut_off`.
"""


class Counted(Protocol):
    """Something that cost tokens."""

    @property
    def num_generated(self) -> int:
        """Tokens generated for it."""

    @property
    def num_read(self) -> int:
        """Tokens read for it."""


class Tokens(NamedTuple):
    """Tokens that a model spent."""

    generated: int
    read: int

    @classmethod
    def of(cls, all_of: Iterable[Counted]) -> "Tokens":
        """Their sums."""
        counted = list(all_of)
        return cls(
            sum(each.num_generated for each in counted), sum(each.num_read for each in counted)
        )


class Transcript(NamedTuple):
    """What became of one red-team prompt."""

    prompt: RedTeamPrompt
    init_response: str
    critiques: tuple[str, ...]
    revisions: tuple[str, ...]
    principles: tuple[str, ...]
    """Name of the principle of each pass."""
    critic: str
    """`base`, `global`, or `0.5` for the adapter at half its strength."""
    dropped: str | None
    """Why it makes no pair, one of `REASONS`; None where it does."""
    cut_off: tuple[str, ...]
    """Turns that the length limit ended: `response`, `critique`, `revision`.

    A pair is kept with a response or a critique that was cut off, not with such a revision.
    """
    num_generated: int
    """Tokens generated for it."""
    num_read: int
    """Tokens read for it."""

    @property
    def pair(self) -> PreferencePair:
        """The revised response against the red one."""
        prompt = self.prompt
        assert self.dropped is None
        return PreferencePair(
            prompt.messages, self.revisions[-1], self.init_response, prompt.source, prompt.row
        )


def pair_record(transcript: Transcript) -> dict[str, Any]:
    """A transcript as a line of `pairs.jsonl`; what it did not get to is empty or None."""
    dropped = transcript.dropped is not None
    record = {
        "prompt": _prompt_column(transcript.prompt.messages),
        "init_response": transcript.init_response,
        "critiques": list(transcript.critiques),
        "revisions": list(transcript.revisions),
        "chosen": None if dropped else transcript.revisions[-1],
        "rejected": None if dropped else transcript.init_response,
        "principle": ", ".join(transcript.principles),
        "critic": transcript.critic,
        "row": transcript.prompt.row,
    }
    return {**record, "reason": transcript.dropped} if dropped else record


def _prompt_column(messages: Conversation) -> str | Conversation:
    """The text of a prompt that is a single turn, else its turns."""
    return messages[0]["content"] if len(messages) == 1 else messages


@dataclass(frozen=True)
class RevisionCounts:
    """How many prompts made a pair, why the others did not, and what it cost; adds up."""

    asked: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Prompts that made no pair, by reason."""
    cut_off: Counter[str] = field(default_factory=Counter)
    """Turns that the length limit ended."""
    tokens_generated: int = 0
    tokens_read: int = 0

    @classmethod
    def of(cls, transcripts: Iterable[Transcript]) -> "RevisionCounts":
        """Count transcripts."""
        counted = list(transcripts)
        tokens = Tokens.of(counted)
        dropped = Counter(each.dropped for each in counted if each.dropped is not None)
        return cls(
            asked=len(counted),
            kept=len(counted) - dropped.total(),
            dropped=dropped,
            cut_off=Counter(turn for each in counted for turn in each.cut_off),
            tokens_generated=tokens.generated,
            tokens_read=tokens.read,
        )

    def __add__(self, other: "RevisionCounts") -> "RevisionCounts":
        """The counts of both."""
        return RevisionCounts(
            self.asked + other.asked,
            self.kept + other.kept,
            self.dropped + other.dropped,
            self.cut_off + other.cut_off,
            self.tokens_generated + other.tokens_generated,
            self.tokens_read + other.tokens_read,
        )

    def as_dict(self) -> dict[str, Any]:
        """As `rounds.jsonl` holds them: only reasons and turns that occurred."""
        return {
            "asked": self.asked,
            "kept": self.kept,
            "dropped": {name: self.dropped[name] for name in REASONS if self.dropped[name]},
            "cut_off": dict(sorted(self.cut_off.items())),
            "tokens_generated": self.tokens_generated,
            "tokens_read": self.tokens_read,
        }
