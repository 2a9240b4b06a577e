"""Red-team prompts on their way through the turns of a revision, a batch at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedsafe.model.dialogues import Answer
from fedsafe.safety.constitution import Principle
from fedsafe.safety.transcripts import Transcript
from fedsafe.types import Conversation, RedTeamPrompt, Role, Turn


class Speech(Protocol):
    """A batch of conversations with a model; `model.dialogues.Dialogues` is one."""

    def answer(
        self,
        conversations: Sequence[Conversation | None],
        *,
        max_new_tokens: int,
        seeds: Sequence[int],
        temperature: float = 0.0,
    ) -> Sequence[Answer | None]:
        """See `Dialogues.answer`."""


class Speaker(Protocol):
    """A model that can talk with its adapter on, off or scaled."""

    @property
    def has_adapter(self) -> bool:
        """Whether it has one; without, it is the same model at every scale."""
        return True

    def begin(self, adapter_scale: float) -> Speech:
        """A new batch of conversations; 1 is the adapter as it is, 0 the base alone."""


@dataclass
class Draft:
    """One prompt between two turns.

    Attributes:
        place: Place of the prompt among all.
        prompt: The prompt.
        conversation: All that was said, the prompt first.
        principles: The principle of each pass so far.
        dropped: Why it goes on no more; None where it does.
        finished: Whether the model itself ended its last turn.
        cut_off: Turns that the length limit ended.
        num_generated: Tokens generated for it.
        num_read: Tokens read for it.
    """

    place: int
    prompt: RedTeamPrompt
    conversation: Conversation
    principles: list[Principle] = field(default_factory=list)
    dropped: str | None = None
    finished: bool = True
    cut_off: list[str] = field(default_factory=list)
    num_generated: int = 0
    num_read: int = 0

    @classmethod
    def of(cls, place: int, prompt: RedTeamPrompt) -> "Draft":
        """A prompt that nobody has answered, but perhaps the one who wrote it."""
        draft = cls(place, prompt, list(prompt.messages))
        if prompt.response is not None:
            draft.say("assistant", prompt.response)
        return draft

    def say(self, role: Role, content: str) -> None:
        """Add a turn."""
        self.conversation.append(Turn(role=role, content=content))

    def hear(self, turn: str, answer: Answer) -> None:
        """Add the model's turn, or end where the conversation left no room for one."""
        self.num_generated += answer.num_tokens
        self.num_read += answer.num_read
        if not answer.fits:
            self.dropped = "unreadable" if answer.unreadable else "too_long"
            return
        self.finished = answer.finished
        if not answer.finished:
            self.cut_off.append(turn)
        self.say("assistant", answer.text)

    @property
    def last(self) -> str:
        """What was said last."""
        return self.conversation[-1]["content"]

    @property
    def response(self) -> str:
        """The red response; nothing where there is none."""
        return next(iter(self._answers()), "")

    def revised(self) -> Conversation:
        """The prompt with the revision, which was said last, for an answer."""
        return [*self.prompt.messages, Turn(role="assistant", content=self.last)]

    def transcript(self, critic: str) -> Transcript:
        """What became of it."""
        answers = self._answers()
        return Transcript(
            self.prompt,
            self.response,
            critiques=tuple(answers[1::2]),
            revisions=tuple(answers[2::2]),
            principles=tuple(principle.name for principle in self.principles),
            critic=critic,
            dropped=self.dropped,
            cut_off=tuple(self.cut_off),
            num_generated=self.num_generated,
            num_read=self.num_read,
        )

    def _answers(self) -> list[str]:
        """Response, critique, revision, critique, revision and so on."""
        said = self.conversation[len(self.prompt.messages) :]
        return [turn["content"] for turn in said if turn["role"] == "assistant"]


class Talk:
    """One batch of a speaker's conversations; some end before the others.

    Args:
        speech: A new one.
    """

    def __init__(self, speech: Speech) -> None:
        self._speech = speech
        self._places: list[int] = []

    def answer(
        self,
        turn: str,
        drafts: Sequence[Draft],
        *,
        max_new_tokens: int,
        seeds: Mapping[int, int],
        temperature: float = 0.0,
    ) -> None:
        """Let the model take its turn.

        Args:
            turn: What the turn is called, where it is cut off.
            drafts: Those that go on; all of them were in the first call.
            max_new_tokens: Tokens at which an answer is cut off.
            seeds: One a draft, by its place.
            temperature: 0 for the likeliest answers; above 0 to sample.
        """
        if not drafts:
            return
        by_place = {draft.place: draft for draft in drafts}
        self._places = self._places or list(by_place)
        assert by_place.keys() <= set(self._places)
        answers = self._speech.answer(
            [by_place[p].conversation if p in by_place else None for p in self._places],
            max_new_tokens=max_new_tokens,
            seeds=[seeds.get(place, 0) for place in self._places],
            temperature=temperature,
        )
        for place, answer in zip(self._places, answers, strict=True):
            if answer is not None:
                by_place[place].hear(turn, answer)


def going_on(drafts: Sequence[Draft]) -> list[Draft]:
    """Those that nothing has ended."""
    return [draft for draft in drafts if draft.dropped is None]


def by_length(prompts: Sequence[RedTeamPrompt], *, batch_size: int) -> list[list[int]]:
    """Batches of prompts of like length, by their places, longest first.

    What does not fit into memory shows at once, and the time that is left is not underestimated.
    Those with a response of their own are apart: the model has not read the others' first turn.
    """
    sizes = [sum(len(turn["content"]) for turn in prompt.messages) for prompt in prompts]
    batches = []
    for has_response in (False, True):
        places = [i for i, p in enumerate(prompts) if (p.response is not None) == has_response]
        places.sort(key=sizes.__getitem__, reverse=True)
        starts = range(0, len(places), batch_size)
        batches += [places[start : start + batch_size] for start in starts]
    return batches
