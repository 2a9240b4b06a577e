"""What every guard is: conversations in, verdicts out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from fedsafe.types import Conversation, JudgedPart, Turn, Verdict

Given = TypeVar("Given")
Made = TypeVar("Made")


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

    @property
    def origin(self) -> str:
        """Where the guard comes from and how it is set, whatever is there now.

        Another identity of the same origin means that a checkpoint changed in its place.
        """
        return self.name

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
    """Some of several conversations cannot be judged.

    Args:
        reasons: Which ones of the list, by index, and why, without any of their text.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        index, reason = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        super().__init__(f"conversation {index}: {reason}{more}")
        self.reasons = reasons

    def __reduce__(self) -> tuple[type["UnjudgeableError"], tuple[Mapping[int, str]]]:
        """As it is sent to other ranks."""
        return UnjudgeableError, (self.reasons,)

    def renumbered(self, places: Sequence[int]) -> "UnjudgeableError":
        """The same of a list in which conversation `index` stands at ``places[index]``."""
        return UnjudgeableError({places[index]: each for index, each in self.reasons.items()})


def for_each(make: Callable[[Given], Made], items: Iterable[Given]) -> list[Made]:
    """What is made of each item; all those that it cannot be made of are named together.

    Raises:
        UnjudgeableError: If `make` raises a ValueError.
    """
    made, failed = [], {}
    for index, item in enumerate(items):
        try:
            made.append(make(item))
        except ValueError as error:
            failed[index] = str(error)
    if failed:
        raise UnjudgeableError(failed)
    return made


def judge_each(
    judge: Callable[[Sequence[Conversation]], list[Verdict]], conversations: Sequence[Conversation]
) -> tuple[dict[int, Verdict], dict[int, str]]:
    """Verdicts by index; and by index why the guard cannot judge the others."""
    places, reasons = list(range(len(conversations))), dict[int, str]()
    while places:
        try:
            verdicts = judge([conversations[place] for place in places])
        except UnjudgeableError as error:
            reasons |= {places[index]: each for index, each in error.reasons.items()}
            places = [place for place in places if place not in reasons]
        else:
            return dict(zip(places, verdicts, strict=True)), reasons
    return {}, reasons


def shown(messages: Conversation, part: JudgedPart) -> Conversation:
    """What a guard is shown of a sample.

    Args:
        messages: The sample; its last turn is the assistant's.
        part: `pair` shows all of it, so that the answer is judged in its context; `prompt` ends
            with the user's last turn; `response` shows the answer alone, as if a user had said it.
    """
    if part == "pair":
        return messages
    if part == "prompt":
        last = max((i for i, turn in enumerate(messages) if turn["role"] == "user"), default=-1)
        return messages[: last + 1]
    return [Turn(role="user", content=messages[-1]["content"])]
