"""Self-revision by a constitution: red response, critique, revision.

References:
    Bai et al. (2022), Constitutional AI: Harmlessness from AI Feedback, section 3.
    https://arxiv.org/abs/2212.08073
    Noh and Baek (2025), figure 3. https://arxiv.org/abs/2502.16691
"""

from collections.abc import Collection, Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from typing import Any, Literal, NamedTuple, final

from fedsafe.federated.schedule import Stream, derive_seed, random_stream
from fedsafe.peers import ALONE, Peers
from fedsafe.safety.constitution import Gate, Principle, load_constitution
from fedsafe.safety.drafts import Draft, Speaker, Speech, Talk, by_length, going_on
from fedsafe.safety.guard import Guard, judge_each
from fedsafe.safety.refusal_openings import normal_opening, opens_with
from fedsafe.safety.refusal_rule import is_refusal
from fedsafe.safety.transcripts import RevisionCounts, Tokens, Transcript, pair_record
from fedsafe.types import RedTeamPrompt

__all__ = [
    "Critic",
    "RefusalRate",
    "Reviser",
    "RevisionCounts",
    "Speaker",
    "Speech",
    "Transcript",
    "pair_record",
]

Critic = float | str

_GATE_TOKENS = 24
"""Tokens of the critic's reply to the gate's question: only how it begins is read."""


class RefusalRate(NamedTuple):
    """How often a model refuses."""

    percent: float
    num_generated: int
    """Tokens generated to find out."""
    num_read: int
    """Tokens read to find out."""


@final
class Reviser:
    """Lets a model answer red-team prompts, criticise and revise its answers.

    Args:
        constitution: Name of a constitution of fedsafe (`default`), or a YAML file.
        critic: Who criticises and revises: the frozen `base` (adapter off), the `global` model
            itself, or a number between 0 and 1, the strength of the adapter.
        passes: Times that an answer is criticised and revised, 1 or more.
        max_new_tokens: Tokens at which each turn is cut off.
        temperature: Of the red response; 0 for the likeliest.
        critic_temperature: Of critique and revision; 0 for the likeliest.
        batch_size: Conversations at a time; decides nothing of what is said in float32, and by
            rounding something in bfloat16.
        guard: Drops pairs whose revision it calls unsafe; None asks no guard.
        guard_threshold: Probability from which it does, 0 to 1.
        critic_gate: Whether the critic is asked about the revision too, where the constitution has
            a `gate` that says how.
        openings: How every refusal of the model begins, where that is a closed list; an empty one
            opens every answer. None for English chat models, whose refusals a rule finds.
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
        for name, number in (
            ("passes", passes),
            ("max_new_tokens", max_new_tokens),
            ("batch_size", batch_size),
        ):
            if number < 1:
                raise ValueError(f"{name} of the reviser is {number}; give 1 or more")
        for name, value in (
            ("temperature", temperature),
            ("critic_temperature", critic_temperature),
        ):
            if not value >= 0:
                raise ValueError(f"{name} of the reviser is {value}; give 0 or more")
        if not 0 <= guard_threshold <= 1:
            raise ValueError(f"guard_threshold is {guard_threshold}; give a number from 0 to 1")
        self._scale = _scale_of(critic)
        self._critic = critic if isinstance(critic, str) else f"{critic:g}"
        self._constitution = load_constitution(constitution)
        self._passes = passes
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._critic_temperature = critic_temperature
        self.batch_size = batch_size
        self._guard = guard
        self._guard_threshold = guard_threshold
        self._gate = self._constitution.gate if critic_gate else None
        self._openings = None if openings is None else [*map(normal_opening, openings)]

    def identity(self) -> dict[str, Any]:
        """All that decides a transcript beside the model, the prompts and the seed.

        Of a model in bfloat16 `batch_size` does too.
        """
        openings = blake2b(repr(self._openings).encode(), digest_size=8).hexdigest()
        return {
            "constitution": f"{self._constitution.name} {self._constitution.digest}",
            "critic": self._critic,
            "passes": self._passes,
            "max_new_tokens": self._max_new_tokens,
            "temperature": self._temperature,
            "critic_temperature": self._critic_temperature,
            "guard": None if self._guard is None else self._guard.identity,
            "guard_threshold": None if self._guard is None else self._guard_threshold,
            "critic_gate": self._gate is not None,
            "openings": openings,
        }

    def revise(
        self,
        speaker: Speaker,
        prompts: Sequence[RedTeamPrompt],
        *,
        seed: int,
        replicas: Peers = ALONE,
        replica: Peers = ALONE,
    ) -> Iterator[tuple[int, Transcript]]:
        """The transcript of each prompt with its place among them, batch by batch.

        What is said in place i depends on the prompt, `seed` and i alone, not on the batch: of a
        model in float32. In bfloat16 numbers are rounded otherwise in batches of another size, and
        what is said may differ with `batch_size`. The arguments are those of `revise_in_batches`.
        """
        for batch in self.revise_in_batches(
            speaker, prompts, seed=seed, replicas=replicas, replica=replica
        ):
            yield from batch

    def revise_in_batches(
        self,
        speaker: Speaker,
        prompts: Sequence[RedTeamPrompt],
        *,
        seed: int,
        done: Collection[int] = (),
        replicas: Peers = ALONE,
        replica: Peers = ALONE,
    ) -> Iterator[list[tuple[int, Transcript]]]:
        """The same, a batch at a time, which is through with all its turns.

        Args:
            speaker: The model.
            prompts: All of them, also those that are done.
            seed: Seed of sampling and of the principles.
            done: Places that are left out.
            replicas: Those who share the batches; all are given the same prompts, and get all
                transcripts.
            replica: Ranks that hold the model together; the first of them asks the guard.
        """
        batches = by_length(prompts, batch_size=self.batch_size)
        left = [[i for i in places if i not in done] for places in batches]

        def revise(places: Sequence[int]) -> list[tuple[int, Transcript]]:
            drafts = [Draft.of(i, prompts[i]) for i in places]
            self._converse(speaker, drafts, seed=seed)
            self._judge(speaker, drafts, replica)
            return [(draft.place, draft.transcript(self._critic)) for draft in drafts]

        try:
            yield from replicas.in_turns(filter(None, left), revise)
        finally:
            if self._guard is not None:
                self._guard.release()

    def refusal_rate(
        self,
        speaker: Speaker,
        prompts: Sequence[RedTeamPrompt],
        *,
        seed: int,
        max_new_tokens: int = 16,
        replicas: Peers = ALONE,
    ) -> RefusalRate:
        """How often the global model refuses prompts, of those that it can read.

        Args:
            speaker: The model.
            prompts: What to ask; responses of their own are not looked at.
            seed: Seed of sampling.
            max_new_tokens: Tokens generated for each answer; a refusal shows early.
            replicas: Those who share the batches; all are given the same prompts.

        Raises:
            ValueError: If it can read none of them.
        """
        size = min(max_new_tokens, self._max_new_tokens)

        def respond(places: Sequence[int]) -> list[Draft]:
            asked = [Draft.of(i, prompts[i]._replace(response=None)) for i in places]
            self._respond(Talk(speaker.begin(1.0)), asked, seed=seed, max_new_tokens=size)
            return asked

        batches = by_length(prompts, batch_size=self.batch_size)
        drafts = list(chain.from_iterable(replicas.in_turns(batches, respond)))
        answered = [draft for draft in drafts if draft.dropped not in ("too_long", "unreadable")]
        if not answered:
            raise ValueError(
                f"none of {len(prompts)} prompts can be asked for the refusal rate: there are none "
                "or they are longer than the model can read, or its chat template refuses them"
            )
        num_refused = sum(draft.dropped == "refused" for draft in answered)
        return RefusalRate(100.0 * num_refused / len(answered), *Tokens.of(drafts))

    def _is_refusal(self, answer: str) -> bool:
        return is_refusal(answer) if self._openings is None else opens_with(answer, self._openings)

    # ---- the turns of a batch --------------------------------------------------------------------

    def _converse(self, speaker: Speaker, drafts: Sequence[Draft], *, seed: int) -> None:
        """Response, critiques and revisions; the memory of the conversations ends with it."""
        talk = Talk(speaker.begin(1.0))
        is_other = self._scale != 1.0 and speaker.has_adapter
        critic = Talk(speaker.begin(self._scale)) if is_other else talk
        self._respond(talk, drafts, seed=seed, max_new_tokens=self._max_new_tokens)
        del talk  # another critic has read none of it
        for number in range(self._passes):
            for draft in going_on(drafts):
                draft.principles.append(self._principle(seed, draft.place, number))
                draft.say("user", draft.principles[-1].critique_request)
            self._criticise(critic, "critique", drafts, seed=seed, number=1 + 2 * number)
            for draft in going_on(drafts):
                draft.say("user", draft.principles[-1].revision_request)
            self._criticise(critic, "revision", drafts, seed=seed, number=2 + 2 * number)

    def _respond(
        self, talk: Talk, drafts: Sequence[Draft], *, seed: int, max_new_tokens: int
    ) -> None:
        """The first turn, unless the prompt brings it; drops what is no red response."""
        asked = [draft for draft in drafts if draft.prompt.response is None]
        talk.answer(
            "response",
            asked,
            max_new_tokens=max_new_tokens,
            seeds=_seeds(asked, seed=seed, number=0),
            temperature=self._temperature,
        )
        for draft in going_on(drafts):
            if not draft.last.strip():
                draft.dropped = "empty"
            elif self._is_refusal(draft.last):
                draft.dropped = "refused"

    def _criticise(
        self,
        talk: Talk,
        turn: Literal["critique", "revision"],
        drafts: Sequence[Draft],
        *,
        seed: int,
        number: int,
    ) -> None:
        asked = going_on(drafts)
        talk.answer(
            turn,
            asked,
            max_new_tokens=self._max_new_tokens,
            seeds=_seeds(asked, seed=seed, number=number),
            temperature=self._critic_temperature,
        )

    def _principle(self, seed: int, place: int, number: int) -> Principle:
        principles = self._constitution.principles
        rng = random_stream(Stream.PRINCIPLE, seed, place, number)
        return principles[int(rng.integers(len(principles)))]

    # ---- the gate --------------------------------------------------------------------------------

    def _judge(self, speaker: Speaker, drafts: Sequence[Draft], replica: Peers) -> None:
        """Drop what makes no pair to learn from."""
        for draft in going_on(drafts):
            if not draft.finished:
                draft.dropped = "endless"
            elif not draft.last.strip():
                draft.dropped = "empty"
            elif _plain(draft.last) == _plain(draft.response):
                draft.dropped = "unchanged"
        if self._guard is not None:
            self._ask_guard(self._guard, going_on(drafts), replica)
        if self._gate is not None:
            self._ask_critic(self._gate, speaker, going_on(drafts))

    def _ask_guard(self, guard: Guard, drafts: Sequence[Draft], replica: Peers) -> None:
        asked = [draft.revised() for draft in drafts]
        verdicts, reasons = replica.from_first(lambda: judge_each(guard.judge, asked))
        for index in reasons:
            drafts[index].dropped = "unjudgeable"
        for index, verdict in verdicts.items():
            if verdict.unsafe >= self._guard_threshold:
                drafts[index].dropped = "flagged_by_guard"

    def _ask_critic(self, gate: Gate, speaker: Speaker, drafts: Sequence[Draft]) -> None:
        """Show the critic prompt and revision alone, without what led to it."""
        questions = [Draft(draft.place, draft.prompt, draft.revised()) for draft in drafts]
        for draft, question in zip(drafts, questions, strict=True):
            question.say("user", gate.request or draft.principles[-1].critique_request)
        talk = Talk(speaker.begin(self._scale))
        talk.answer("gate", questions, max_new_tokens=_GATE_TOKENS, seeds={})
        for draft, question in zip(drafts, questions, strict=True):
            draft.num_generated += question.num_generated
            draft.num_read += question.num_read
            draft.dropped = question.dropped
            if question.dropped is None and opens_with(question.last, gate.flagged):
                draft.dropped = "flagged_by_critic"


def _seeds(drafts: Sequence[Draft], *, seed: int, number: int) -> dict[int, int]:
    """Seeds of a turn, by place; the response is turn 0."""
    places = (draft.place for draft in drafts)
    return {place: derive_seed(Stream.SPEECH, seed, place, number) for place in places}


def _scale_of(critic: Critic) -> float:
    """Strength of the adapter when it criticises."""
    scales = {"base": 0.0, "global": 1.0}
    scale = scales.get(critic, -1.0) if isinstance(critic, str) else critic
    if not 0 <= scale <= 1:
        raise ValueError(
            f"critic of the reviser is {critic!r}; give base, global, or the adapter's strength, a "
            "number from 0 to 1"
        )
    return scale


def _plain(text: str) -> str:
    """Text without differences of case and white space."""
    return " ".join(text.casefold().split())
