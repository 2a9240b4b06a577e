"""What every guard is: conversations in, verdicts out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from fedsafe.types import Conversation, JudgedPart, Turn, Verdict


class Guard(ABC):
    """A model that gives a verdict on conversations.

    Building one is cheap: weights are loaded when the first conversation is judged.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for reports, such as `llama-guard-3-8b`."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Digest of all that a verdict depends on: the weights, the prompt, the settings.

        Verdicts are kept under it, so it changes when they could.
        """

    @abstractmethod
    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """One verdict a conversation, in order; the same for the same list.

        Args:
            conversations: Each ends with the turn that is judged, the user's or the assistant's.

        Raises:
            UnjudgeableError: If a conversation cannot be judged.
            ValueError: If the guard cannot judge at all.
        """

    def release(self) -> None:  # noqa: B027
        """Free the memory that judging took; the next conversation loads the weights again."""


class UnjudgeableError(ValueError):
    """One of several conversations cannot be judged.

    Args:
        index: Which one of the list.
        reason: Why, without any of its text.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"conversation {index}: {reason}")
        self.index = index
        self.reason = reason


def shown(messages: Conversation, part: JudgedPart) -> Conversation:
    """What a guard is shown of a sample.

    Args:
        messages: The sample; its last turn is the assistant's.
        part: `pair` shows all of it, so that the answer is judged in its context; `prompt` leaves
            the answer out; `response` shows the answer alone, as if a user had said it.
    """
    if part == "pair":
        return messages
    if part == "prompt":
        return messages[:-1]
    return [Turn(role="user", content=messages[-1]["content"])]
