"""Self-revision by a constitution: red response, critique, revision.

References:
    Bai et al. (2022), Constitutional AI: Harmlessness from AI Feedback, section 3.
    https://arxiv.org/abs/2212.08073
    Noh and Baek (2025), figure 3. https://arxiv.org/abs/2502.16691
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

from fedsafe.model.dialogues import Answer
from fedsafe.safety.guard import Guard
from fedsafe.types import Conversation, PreferencePair, RedTeamPrompt

Critic = Literal["base", "global"] | float


class Speech(Protocol):
    """A batch of conversations with a model; `model.dialogues.Dialogues` is one."""

    def answer(
        self,
        conversations: Sequence[Conversation | None],
        *,
        max_new_tokens: int,
        seeds: Sequence[int],
        temperature: float = 0.0,
    ) -> list[Answer | None]:
        """See `Dialogues.answer`."""


class Speaker(ABC):
    """A model that can talk with its adapter on, off or scaled."""

    @abstractmethod
    def begin(self, adapter_scale: float) -> Speech:
        """A new batch of conversations; 1 is the adapter as it is, 0 the base alone."""


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
    """Why it makes no pair; None where it does."""
    cut_off: tuple[str, ...]
    """Turns that the length limit ended: `response`, `critique`, `revision`."""
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


class Reviser:
    """Lets a model answer red-team prompts, criticise and revise its answers.

    Args:
        constitution: Name of a constitution of fedsafe (`default`), or a YAML file.
        critic: Who criticises and revises: the frozen `base` (adapter off), the `global` model
            itself, or a number between 0 and 1, the strength of the adapter.
        passes: Times that an answer is criticised and revised, 1 or more.
        max_new_tokens: Tokens at which each turn is cut off.
        temperature: Of the red response; 0 for the likeliest.
        critic_temperature: Of critique and revision.
        batch_size: Conversations at a time.
        guard: Drops pairs whose revision it calls unsafe; None asks no guard.
        guard_threshold: Probability from which it does.
        critic_gate: Whether the critic is asked about the revision too, as the constitution's
            `gate` says.
        openings: How a refusal begins, in lower case; None takes a list of common English ones.
    """

    def __init__(  # noqa: PLR0913
        self,
        constitution: str = "default",
        critic: Critic = "base",
        passes: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        critic_temperature: float = 0.0,
        batch_size: int = 64,
        guard: Guard | None = None,
        guard_threshold: float = 0.5,
        critic_gate: bool = True,
        openings: list[str] | None = None,
    ) -> None:
        raise NotImplementedError

    def revise(
        self, speaker: Speaker, prompts: Sequence[RedTeamPrompt], *, seed: int
    ) -> Iterator[tuple[int, Transcript]]:
        """The transcript of each prompt with its place among them, batch by batch.

        What is said in place i depends on the prompt, `seed` and i alone.
        """
        raise NotImplementedError
