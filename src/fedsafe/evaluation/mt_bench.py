"""MT-Bench: 80 questions in two turns, and a judge of the replies.

References:
    Zheng et al. (2023), Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena.
    https://arxiv.org/abs/2306.05685
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from fedsafe.evaluation.benchmark import (
    Benchmark,
    Record,
    Respondent,
    check_counts,
    evenly_spread,
)
from fedsafe.evaluation.judge import Judge
from fedsafe.evaluation.judge_prompts import Mode, load_judge_prompts
from fedsafe.evaluation.judge_stopping import StoppableJudge
from fedsafe.evaluation.mt_bench_files import (
    ID_PREFIX,
    NUM_TURNS,
    Question,
    load_answers,
    load_questions,
)
from fedsafe.evaluation.mt_bench_judging import (
    Judging,
    PairwiseComparison,
    Replied,
    Scored,
    SingleRating,
)
from fedsafe.federated.schedule import Stream, derive_seed
from fedsafe.model.dialogues import Dialogues
from fedsafe.types import Conversation, Turn

NO_JUDGE = "no judge"
NO_ROOM = "reply does not fit"
UNREADABLE = "chat template refuses the conversation"
NOT_REPLIED = "no reply in the file"

TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""FastChat's; categories that it does not know are sampled at 0.7 there, and here."""
_OTHER_TEMPERATURE = 0.7
_WITH_REFERENCE = ("math", "reasoning", "coding")
_WAYS: Mapping[Mode, type[Judging]] = {"single": SingleRating, "pairwise": PairwiseComparison}


class _Said(NamedTuple):
    """What a model replied to one question."""

    conversation: Conversation
    problem: str | None
    """Why it did not reply in each turn."""
    finished: list[bool]
    """Whether it ended each reply itself."""

    @property
    def replies(self) -> list[str]:
        return [turn["content"] for turn in self.conversation if turn["role"] == "assistant"]


class MTBench(Benchmark):
    """MT-Bench: replies to 80 questions in two turns, rated or compared by a judge.

    In mode `single` each reply is rated from 1 to 10; in mode `pairwise` it is compared with that
    of a baseline, in both orders. Without a judge the replies are generated and written, and every
    score is missing (`no judge`); a later run judges them with `replies`.

    Args:
        path: FastChat's `question.jsonl`, or a hub name with its columns.
        references: FastChat's `reference_answer/….jsonl`: the right answers that the judge is shown
            in `reference_categories`. A question there without one is not judged, and counted.
        judge: Who judges: an `OpenAIJudge` or a `LocalJudge`; null for none. Where it fails for
            good in the middle of a run, what it has not judged is counted, and it is asked no more.
        mode: Whether replies are rated (`single`) or compared with a baseline (`pairwise`).
        baseline: Replies to compare with: `replies/mt_bench.jsonl` of another run, or FastChat's
            `model_answer/….jsonl`.
        replies: Replies to judge in place of new ones, of the same formats; the model is not asked.
        prompts: How the judge is asked: a YAML file, or FastChat's `judge_prompts.jsonl`; null
            takes our own.
        temperatures: Sampling temperature by category, where it is to be another than MT-Bench's:
            0.7 for writing and roleplay, 0.1 for stem and humanities, else 0.
        reference_categories: Categories whose questions have a right answer; null for math,
            reasoning and coding.
        max_new_tokens: Tokens at which a reply is cut off.
        seed: Seed of the sampled replies.
        limit: Questions asked, evenly spread over the file; null for all.
        batch_size: Questions replied to at a time. `fedsafe test` judges as many at a time, and a
            local judge is loaded anew each time; a `SafetyProbe` judges all of its sample together.
            Ranks share these batches: 80 questions are one, lower it for several ranks, and let the
            strategy's timeout be longer than the judge takes for a batch.
        split: Split to take of a hub name.
        name: Of the benchmark's file and measures.

    Raises:
        ValueError: If a setting has no effect, or mode `pairwise` has no baseline.
    """

    def __init__(  # noqa: PLR0913
        self,
        path: str = "lighteval/mt-bench",
        references: str | None = None,
        judge: Judge | None = None,
        mode: Mode = "single",
        baseline: str | None = None,
        replies: str | None = None,
        prompts: str | None = None,
        temperatures: dict[str, float] | None = None,
        reference_categories: list[str] | None = None,
        max_new_tokens: int = 1024,
        seed: int = 0,
        limit: int | None = None,
        batch_size: int = 80,
        split: str = "train",
        name: str = "mt_bench",
    ) -> None:
        if (mode == "pairwise") != (baseline is not None):
            raise ValueError(
                f"mode of {name} is {mode} and baseline is {baseline}; give the baseline's replies "
                "in mode pairwise, and in no other"
            )
        check_counts(name, max_new_tokens=max_new_tokens, limit=limit, batch_size=batch_size)
        self.name = name
        self.measures = _WAYS[mode].measures
        self.batch_size = batch_size
        self._path = path
        self._references_path = references
        self._judge = StoppableJudge(judge) if judge is not None else None
        self._mode: Mode = mode
        self._baseline_path = baseline
        self._replies_path = replies
        self._prompts_path = prompts
        self._given_temperatures = temperatures or {}
        self._given_categories = reference_categories
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._limit = limit
        self._split = split
        self._questions: list[Question] = []

    def load(self) -> None:
        """See `Benchmark`; finds out too whether the judge can be asked."""
        if self._questions:
            return
        questions = load_questions(self._path, split=self._split)
        self._check_categories({question.category for question in questions})
        questions = evenly_spread(questions, self._limit)
        self._judging = _WAYS[self._mode](load_judge_prompts(self._prompts_path))
        self._references = _answers(self._references_path, questions)
        self._baseline = _answers(self._baseline_path, questions)
        self._replies = _answers(self._replies_path, questions)
        if self._judge is not None:
            self._warn_of_missing_references(questions)
            self._judge.check()
        self._questions = questions

    @property
    def categories(self) -> list[str]:
        """See `Benchmark`."""
        return [question.category for question in self._questions]

    def ask(self, respondent: Respondent, places: Sequence[int]) -> list[Record]:
        """See `Benchmark`."""
        questions = [self._questions[place] for place in places]
        if self._replies_path is None:
            said = self._converse(respondent, questions)
        else:
            said = [self._said_before(question) for question in questions]
        replied = list(map(self._replied, questions, said))
        scored = respondent.replica.from_first(lambda: self._score(replied))
        return [
            Record(
                f"{ID_PREFIX}{question.id}",
                each.scores,
                category=question.category,
                conversation=talk.conversation,
                details={**each.details, "finished": talk.finished},
                problem=each.problem,
            )
            for question, talk, each in zip(questions, said, scored, strict=True)
        ]

    # ---- replies ---------------------------------------------------------------------------------

    def _converse(self, respondent: Respondent, questions: Sequence[Question]) -> list[_Said]:
        """Ask both turns; questions of one temperature go together."""
        by_temperature: dict[float, list[int]] = {}
        for index, question in enumerate(questions):
            temperature = self._temperature(question.category)
            by_temperature.setdefault(temperature, []).append(index)
        said: dict[int, _Said] = {}
        for temperature, indices in by_temperature.items():
            for begin in range(0, len(indices), self.batch_size):
                batch = indices[begin : begin + self.batch_size]
                some = [questions[index] for index in batch]
                talks = self._converse_at(respondent, some, temperature=temperature)
                said |= zip(batch, talks, strict=True)
        return [said[index] for index in range(len(questions))]

    def _temperature(self, category: str) -> float:
        usual = TEMPERATURES.get(category, _OTHER_TEMPERATURE)
        return self._given_temperatures.get(category, usual)

    def _converse_at(
        self, respondent: Respondent, questions: Sequence[Question], *, temperature: float
    ) -> list[_Said]:
        dialogues = Dialogues(respondent.model, respondent.tokenizer)
        said = [_Said([], None, []) for _ in questions]
        for turn in range(NUM_TURNS):
            for talk, question in zip(said, questions, strict=True):
                if talk.problem is None:
                    talk.conversation.append(Turn(role="user", content=question.turns[turn]))
            answers = dialogues.answer(
                [talk.conversation if talk.problem is None else None for talk in said],
                max_new_tokens=self._max_new_tokens,
                seeds=[derive_seed(Stream.EVALUATION, self._seed, q.row, turn) for q in questions],
                temperature=temperature,
                last=turn == NUM_TURNS - 1,
            )
            for index, answer in enumerate(answers):
                if answer is not None and not answer.fits:
                    problem = UNREADABLE if answer.unreadable else NO_ROOM
                    said[index] = said[index]._replace(problem=problem)
                elif answer is not None:
                    reply = Turn(role="assistant", content=answer.text)
                    said[index].conversation.append(reply)
                    said[index].finished.append(answer.finished)
        return said

    def _said_before(self, question: Question) -> _Said:
        """What the file of replies has of a question."""
        texts = self._replies.get(question.id, [])[: len(question.turns)]
        conversation: Conversation = []
        for asked, reply in zip(question.turns, texts, strict=False):
            conversation.append(Turn(role="user", content=asked))
            conversation.append(Turn(role="assistant", content=reply))
        problem = NOT_REPLIED if len(texts) < len(question.turns) else None
        return _Said(conversation, problem, [])

    # ---- scores ----------------------------------------------------------------------------------

    def _replied(self, question: Question, said: _Said) -> Replied:
        return Replied(
            questions=question.turns,
            replies=said.replies,
            problem=said.problem,
            needs_reference=question.category in self._with_reference,
            reference=self._references.get(question.id, ()),
            baseline=self._baseline.get(question.id, ()),
        )

    def _score(self, asked: Sequence[Replied]) -> list[Scored]:
        if self._judge is None:
            return [self._judging.without_judge(each, NO_JUDGE) for each in asked]
        try:
            return self._judging.score(self._judge, asked)
        finally:
            self._judge.release()

    @property
    def _with_reference(self) -> Sequence[str]:
        given = self._given_categories
        return _WITH_REFERENCE if given is None else given

    def _check_categories(self, known: Collection[str]) -> None:
        for setting, given in (
            ("temperatures", self._given_temperatures),
            ("reference_categories", self._given_categories or ()),
        ):
            for category in given:
                if category not in known:
                    raise ValueError(
                        f"{setting} of {self.name} names the category {category}; {self._path} has "
                        f"{', '.join(sorted(known))}"
                    )

    def _warn_of_missing_references(self, questions: Sequence[Question]) -> None:
        missing = [
            question
            for question in questions
            if question.category in self._with_reference and question.id not in self._references
        ]
        if missing:
            categories = ", ".join(sorted({question.category for question in missing}))
            warnings.warn(
                f"{len(missing)} of {len(questions)} questions of {self.name} ({categories}) have "
                "no reference answer and will not be judged; give references, or set "
                "reference_categories: []",
                stacklevel=3,
            )


def _answers(path: str | None, questions: Sequence[Question]) -> dict[str, list[str]]:
    """The answers of a file by question.

    Raises:
        ValueError: If it answers none of the questions.
    """
    if path is None:
        return {}
    answers = load_answers(path)
    if not any(question.id in answers for question in questions):
        raise ValueError(
            f"{path} answers none of the {len(questions)} questions; its ids are "
            f"{', '.join([*answers][:3])} …, theirs {questions[0].id} …: give a file of the same "
            "questions"
        )
    return answers
