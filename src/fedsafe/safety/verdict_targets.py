"""Labelled conversations as what a guard reads and should answer, so that `fit` trains a guard.

The context is the guard's own prompt; the loss is on the label, the kind of harm where it is known,
and the end of the turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

from fedsafe.data.tokens import Encoder, encode_samples, tokenizer_key
from fedsafe.safety.guard import UnjudgeableError, shown
from fedsafe.safety.guard_format import Categories, GuardFormat, Question, load_format
from fedsafe.safety.prompts import GuardPrompts, answer_tokens, label_ids
from fedsafe.types import JudgedPart, Label, Role, TokenizedConversation


@dataclass(frozen=True)
class VerdictTargets:
    """Trains the model to be a guard: to answer with the `label` of each conversation.

    Args:
        format: Format of the guard: the name of a shipped one, or the path of a YAML file.
        judge: What the guard is shown: the `pair` of prompt and response, the `prompt` alone, or
            the `response` alone.
        categories: Whether it learns to name the kind of harm too, where a conversation has a
            `category` that the format knows by its code or its meaning.
    """

    format: str
    judge: JudgedPart = "pair"
    categories: bool = True


def tokenize_verdicts(
    samples: datasets.Dataset,
    targets: VerdictTargets,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    on_bad_row: Literal["error", "skip"] = "error",
    rejected: Path | None = None,
) -> datasets.Dataset:
    """Tokenise labelled samples as prompts and verdicts, or load the tokens from the cache.

    Args:
        samples: As `data.sources.load_samples` returns them.
        targets: Which guard is trained, and on what.
        tokenizer: The guard's own.
        max_length: Number of tokens of prompt and verdict together. Of a conversation that is too
            long the guard is shown beginning and end; a verdict is never cut off.
        on_bad_row: `error` stops at a sample without a label or one that the guard's template
            refuses; `skip` leaves it out.
        rejected: JSONL file to which samples that are left out are added.

    Returns:
        The columns of `data.tokens.tokenize_samples`; `answer_mask` is 1 on the verdict.

    Raises:
        ValueError: If the format's answers cannot be written as targets or do not fit the
            tokenizer or `max_length`; if a sample cannot be used (source and row are named).
    """
    format_ = load_format(targets.format)
    verdicts = _Verdicts(format_, targets, tokenizer, max_length=max_length)
    return encode_samples(samples, verdicts, on_bad_row=on_bad_row, rejected=rejected)


class _Verdicts(Encoder):
    """Prompts of a guard, answered by the samples' labels."""

    nothing_left = "it has no verdict"  # which does not happen: a verdict is never cut off

    def __init__(
        self,
        format_: GuardFormat,
        targets: VerdictTargets,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
    ) -> None:
        _check_answers(format_)
        self._judge = targets.judge
        self._role: Role = "assistant" if targets.judge == "pair" else "user"
        question = format_.question(self._role)
        self._categories = format_.categories if targets.categories else None
        self._answers = _answers(format_, question, self._categories, tokenizer)
        self._key = [asdict(format_), asdict(targets), max_length, *tokenizer_key(tokenizer)]
        longest = max(map(len, self._answers.values()))
        try:
            self._prompts = GuardPrompts(
                format_,
                tokenizer,
                window=max_length - longest,
                too_long="head_and_tail",
                categories=None,
                excluded_categories=(),
            )
        except ValueError as error:
            raise ValueError(
                f"cannot ask {format_.name} within max_length {max_length}, {longest} of which are "
                f"the verdict's: {error}"
            ) from error

    def key(self) -> list[Any]:
        return self._key

    def prepare(self, sample: Mapping[str, Any]) -> TokenizedConversation:
        if sample["label"] is None:
            raise ValueError("has no label, which a guard is trained on; label it safe or unsafe")
        conversation = shown(sample["messages"], self._judge)
        try:
            [prompt] = self._prompts.render([conversation], {})
        except UnjudgeableError as error:
            raise ValueError(error.reasons[0]) from error
        is_unsafe = sample["label"] == "unsafe"
        code = self._code(sample["category"]) if is_unsafe else None
        answer = self._answers[sample["label"], code]
        mask = [False] * len(prompt.ids) + [True] * len(answer)
        return TokenizedConversation(prompt.ids + answer, mask)

    def encode(self, prepared: Sequence[TokenizedConversation]) -> list[TokenizedConversation]:
        return list(prepared)

    def _code(self, category: str | None) -> str | None:
        """The guard's code of a sample's category; None where it has none."""
        if self._categories is None or category is None:
            return None
        wanted = category.strip().casefold()
        codes = self._categories.codes.items()
        found = (c for c, meaning in codes if wanted in (c.casefold(), meaning.casefold()))
        return next(found, None)


def _check_answers(format_: GuardFormat) -> None:
    """Refuse formats whose answer is more than a label and codes, or cannot be trained by `fit`."""
    questions = [each for each in (format_.user, format_.assistant) if each is not None]
    if format_.loader != "causal":
        problem = f"is a model of the kind `{format_.loader}`, and fit trains `causal` ones alone"
    elif any(each.pattern is not None for each in questions):
        problem = "writes more than a label before it is read (`pattern`)"
    elif format_.risks:
        problem = "is asked about each of its risks apart, and a label says not which one it is"
    elif format_.categories is not None and format_.categories.in_label:
        problem = "has labels that hold the kind of harm, and a label says not which one it is"
    else:
        return
    raise ValueError(
        f"there are no verdict targets for the format {format_.name}: it {problem}; take another "
        "format, such as plain"
    )


def _answers(
    format_: GuardFormat,
    question: Question,
    categories: Categories | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[tuple[Label, str | None], list[int]]:
    """The ids of each verdict after the opening, its end included, by label and code."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so a verdict "
            "would have no end; set its eos_token"
        )
    label_ids(format_, question, tokenizer)  # raises where labels cannot be told apart
    end = [tokenizer.eos_token_id]
    ids = answer_tokens(question, tokenizer).labels
    words = {weight: label for label, weight in reversed(question.labels.items())}
    safe, unsafe = ids[words[0]], ids[words[1]]
    answers: dict[tuple[Label, str | None], list[int]] = {
        ("safe", None): safe + end,
        ("unsafe", None): unsafe + end,
    }
    if categories is not None:
        for code in categories.codes:
            named = tokenizer(categories.separator + code, add_special_tokens=False)["input_ids"]
            answers["unsafe", code] = unsafe + named + end
    return answers
