"""What a guard reads: a conversation in its format, as token ids that fit its window.

The checkpoint's own chat template renders the prompt, or that of the format where it has none.
Templates of guards know users and assistants in turn, so turns of the system are left out, and
turns of one role that follow each other become one. A special token that somebody has written in a
turn is broken up by a space: it would end the turn and let the rest pass for the guard's own words.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedsafe.data.chat import default_chat_template
from fedsafe.safety.guard import for_each
from fedsafe.safety.guard_format import GuardFormat, Question
from fedsafe.types import Conversation, Role, Turn

_GAP = " ... "
"""Stands for what is left out of a turn that is too long."""
_PROBE = "fedsafe asks itself\nwhether the template holds this"
"""Two lines: a template that prints a list of parts as Python does would show one."""
_BETWEEN_MERGED = "\n\n"
_ANY_DAY = """\
{% macro strftime_now(format) %}\
{{ format | replace("%d", "01") | replace("%B", "January") | replace("%b", "Jan") \
| replace("%m", "01") | replace("%Y", "2025") }}\
{% endmacro %}"""
"""Some templates write the date: a verdict does not depend on the day it is given."""

Options = Mapping[str, Any]


class GuardPrompt(NamedTuple):
    """What a guard reads of one conversation."""

    ids: list[int]
    """Token ids up to and including the opening: the label comes next."""
    shortened: bool


class AnswerTokens(NamedTuple):
    """What a guard answers, as token ids."""

    opening: list[int]
    labels: dict[str, list[int]]
    """Each label after the opening."""


class GuardPrompts:
    """Renders conversations as prompts of one guard.

    Args:
        format_: The guard's format.
        tokenizer: Its tokenizer; for `image_text` guards the processor's, with its chat template.
        window: Tokens that the guard can read.
        too_long: What to do with a conversation that does not fit: judge its `head_and_tail`, or
            stop with an `error`. The first keeps beginning and end of the longest turns, and the
            policy and the instructions around them whole.
        categories: Kinds of harm in place of the guard's own, code to description; None keeps them.
        excluded_categories: Codes to leave out.

    Raises:
        ValueError: If the template is missing, refuses or does not show a conversation, ignores
            the categories, or leaves no room for a conversation in the window.
    """

    def __init__(
        self,
        format_: GuardFormat,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int,
        too_long: Literal["head_and_tail", "error"],
        categories: Mapping[str, str] | None,
        excluded_categories: Sequence[str],
    ) -> None:
        # the default one, which training gives to a tokenizer without, is no guard's
        own_template = tokenizer.chat_template not in (None, "", default_chat_template())
        if format_.template is None and not own_template:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template, and a guard of "
                f"the format {format_.name} is asked in its own; take the tokenizer that was "
                "published with the guard, or give the format a `template`"
            )
        self._format = format_
        self._tokenizer = tokenizer
        template = format_.template or tokenizer.get_chat_template()
        self._template = (_ANY_DAY if "strftime_now" in template else "") + template
        self._special_tokens = _special_tokens(tokenizer, template)
        self._window = window
        self._too_long = too_long
        # A chat template writes the special tokens; text alone gets them from the tokenizer.
        self._add_special_tokens = format_.loader == "classifier" and format_.template is not None
        self._category_options = format_.category_options(categories, excluded_categories)
        self._openings = {
            role: self._opening_ids(question) for role, question in self._questions().items()
        }
        for role, options in self._ways_to_ask():
            self._check_template(role, options)
            self._check_categories(role, options)
            self._check_window(role, options)

    def render(
        self, conversations: Sequence[Conversation], options: Mapping[str, Any]
    ) -> list[GuardPrompt]:
        """The prompts of conversations that all end with the same role.

        Args:
            conversations: As `Guard.judge` takes them.
            options: Template options beside those of the question, such as those of a risk.

        Raises:
            UnjudgeableError: If a conversation cannot be judged.
        """
        if not conversations:  # a tokenizer does not take none
            return []
        role = conversations[0][-1]["role"]
        assert all(each[-1]["role"] == role for each in conversations)
        question = self._format.question(role)
        shown = [self._shown(each) for each in conversations]
        texts = for_each(lambda each: self._text(each, question, options), shown)
        read = zip(self._tokenize(texts, role), shown, strict=True)
        return for_each(lambda each: self._fitted(*each, role, options), read)

    def _fitted(
        self, ids: list[int], messages: Conversation, role: Role, options: Options
    ) -> GuardPrompt:
        """The prompt, shortened if it must be."""
        if len(ids) <= self._window:
            return GuardPrompt(ids, shortened=False)
        if self._too_long == "error":
            raise ValueError(
                f"it makes a prompt of {len(ids)} tokens, and the guard's window is {self._window};"
                " set too_long: head_and_tail to judge its beginning and end, or a larger window"
            )
        return GuardPrompt(self._shorten(messages, role, options), shortened=True)

    def _questions(self) -> dict[Role, Question]:
        asked: dict[Role, Question | None] = {
            "user": self._format.user,
            "assistant": self._format.assistant,
        }
        return {role: question for role, question in asked.items() if question is not None}

    def _ways_to_ask(self) -> Iterator[tuple[Role, Options]]:
        yield from itertools.product(self._questions(), self._format.risks.values() or [{}])

    def _opening_ids(self, question: Question) -> list[int]:
        if not question.opening:
            return []
        if question.pattern is not None:  # no label need follow it
            return list(self._tokenizer(question.opening, add_special_tokens=False)["input_ids"])
        return answer_tokens(question, self._tokenizer).opening

    def _shown(self, messages: Conversation) -> Conversation:
        """The turns that a template is given."""
        spoken = [
            Turn(role=turn["role"], content=self._special_tokens.sub(_broken_up, turn["content"]))
            for turn in messages
            if turn["role"] != "system"
        ]
        merged = [
            Turn(role=role, content=_BETWEEN_MERGED.join(turn["content"] for turn in turns))
            for role, turns in itertools.groupby(spoken, key=lambda turn: turn["role"])
        ]
        if self._format.history:
            return merged
        return merged[-1:] if merged[-1]["role"] == "user" else merged[-2:]

    def _text(
        self,
        messages: Conversation,
        question: Question,
        options: Options,
        *,
        categories: Options | None = None,
    ) -> str:
        """The prompt without the opening.

        Raises:
            ValueError: If the template refuses the conversation or leaves its last turn out.
        """
        turns: list[dict[str, Any]] = [dict(turn) for turn in messages]
        if categories is None:
            categories = self._category_options
        if question.empty_answer:
            turns.append({"role": "assistant", "content": ""})
        if self._format.content == "parts":
            for turn in turns:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        try:
            text = self._tokenizer.apply_chat_template(
                cast(list[dict[str, str]], turns),
                chat_template=self._template,
                tokenize=False,
                **{"add_generation_prompt": True}
                | question.template_options
                | {**categories, **options},
            )
        except (TemplateError, TypeError) as error:
            # A template may put what it was given into its message, unless it is written there.
            reason = str(error) if str(error) in self._template else type(error).__name__
            raise ValueError(
                f"the template of {self._name()} refuses it: {reason}; show the guard "
                "conversations of a user and an assistant in turn, or take its own template"
            ) from None
        assert isinstance(text, str)
        if messages[-1]["content"].strip() not in text:
            raise ValueError(
                f"the template of {self._name()} leaves the judged turn out or changes it; "
                "a template that expects a list of parts renders plain text as nothing, and the "
                f"other way round: the format {self._format.name} has `content: "
                f"{self._format.content}`, try `content: "
                f"{'text' if self._format.content == 'parts' else 'parts'}`"
            )
        return text if text.endswith(question.ending) else text + question.ending

    def _name(self) -> str:
        if self._format.template is not None:
            return f"the format {self._format.name}"
        return f"the tokenizer {self._tokenizer.name_or_path!r}"

    def _tokenize(self, texts: list[str], role: Role) -> list[list[int]]:
        encoded = self._tokenizer(
            texts,
            add_special_tokens=self._add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        # Apart, as the guard writes it: together, its line ends would merge with the template's.
        return [ids + self._openings[role] for ids in encoded["input_ids"]]

    def _shorten(self, messages: Conversation, role: Role, options: Options) -> list[int]:
        """The prompt with as much of each turn's beginning and end as fits the window."""
        question = self._format.question(role)

        def ids_with(length: int) -> list[int]:
            cut = [Turn(role=t["role"], content=_cut(t["content"], length)) for t in messages]
            (ids,) = self._tokenize([self._text(cut, question, options)], role)
            return ids

        best = ids_with(0)
        if len(best) > self._window:
            raise ValueError(
                f"its {len(messages)} turns make a prompt of {len(best)} tokens even "
                f"without their text, and the guard's window is {self._window}; set a larger window"
            )
        fits, too_long = 0, max(len(turn["content"]) for turn in messages)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            ids = ids_with(middle)
            if len(ids) <= self._window:
                fits, best = middle, ids
            else:
                too_long = middle
        return best

    def _probe(self, role: Role, text: str = _PROBE) -> Conversation:
        turns: Conversation = [Turn(role="user", content=text)]
        return turns if role == "user" else [*turns, Turn(role="assistant", content=text)]

    def _check_template(self, role: Role, options: Options) -> None:
        self._text(self._probe(role), self._format.question(role), options)

    def _check_window(self, role: Role, options: Options) -> None:
        question = self._format.question(role)
        text = self._text(self._probe(role, "x"), question, options)
        (ids,) = self._tokenize([text], role)
        if len(ids) > self._window:
            raise ValueError(
                f"the prompt of {self._format.name} takes {len(ids)} tokens around an empty "
                f"conversation, and the guard's window is {self._window}; set a larger window"
            )

    def _check_categories(self, role: Role, options: Options) -> None:
        """Whether what is set of categories makes a difference to the prompt."""
        question = self._format.question(role)
        given: dict[str, Any] = {}
        without = self._text(self._probe(role), question, options, categories=given)
        for name, value in self._category_options.items():
            # Descriptions that nobody writes: one's own may be equal to the template's.
            given[name] = dict.fromkeys(value, _PROBE) if isinstance(value, dict) else value
            text = self._text(self._probe(role), question, options, categories=given)
            if text == without:
                raise ValueError(
                    f"the template of {self._name()} ignores {', '.join(value)} in `{name}`: the "
                    "prompt is the same without; the guard would judge by its own categories, so "
                    "leave the setting out, or take a guard whose template has the option"
                )
            without = text


def label_ids(
    format_: GuardFormat, question: Question, tokenizer: PreTrainedTokenizerBase
) -> dict[str, int]:
    """The token that tells each label, where it follows the opening.

    Raises:
        ValueError: If a label has no token of its own.
    """
    labels = answer_tokens(question, tokenizer).labels
    for label, ids in labels.items():
        if len(ids) > 1 and format_.label_tokens == "single":
            raise ValueError(
                f"the label {label!r} of {format_.name} is {len(ids)} tokens of the tokenizer "
                f"{tokenizer.name_or_path!r}, not one; set label_tokens: first to tell labels by "
                "their first token, or take the guard's own tokenizer"
            )
        if not ids or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"the label {label!r} of {format_.name} is not in the vocabulary of the tokenizer "
                f"{tokenizer.name_or_path!r}; take the guard's own tokenizer"
            )
    firsts = {label: ids[0] for label, ids in labels.items()}
    for one, other in itertools.combinations(firsts, 2):
        if firsts[one] == firsts[other]:
            raise ValueError(
                f"the labels {one!r} and {other!r} of {format_.name} begin with the same token of "
                f"the tokenizer {tokenizer.name_or_path!r}, so it cannot tell them apart; describe "
                "the answer by a `pattern`"
            )
    return firsts


def answer_tokens(question: Question, tokenizer: PreTrainedTokenizerBase) -> AnswerTokens:
    """The opening as it stands before the labels, and the labels after it.

    A word differs at the beginning of a text and after another (` Safe` after `Safety:`), so both
    are tokenised together, and parted where the labels do.
    """
    texts = [question.opening + label for label in question.labels]
    answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
    together = itertools.takewhile(
        lambda tokens: len(set(tokens)) == 1, zip(*answers, strict=False)
    )
    opening = [tokens[0] for tokens in together]
    labels = zip(question.labels, answers, strict=True)
    return AnswerTokens(opening, {label: ids[len(opening) :] for label, ids in labels})


def _cut(text: str, length: int) -> str:
    """Beginning and end of a text, `length` characters together."""
    if len(text) <= length:
        return text
    tail = length // 2
    return text[: length - tail] + _GAP + text[len(text) - tail :]


def _special_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> re.Pattern[str]:
    """Finds what would become a special token, or a token that the template writes."""
    texts = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if (token.special or token.content in template) and not token.content.isspace()
    ]
    longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _broken_up(special: re.Match[str]) -> str:
    return f"{special[0][0]} {special[0][1:]}"
