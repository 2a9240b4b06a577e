"""A guard's checkpoint in memory, with all that its format says about asking it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.model.pretrained import base_of
from fedsafe.safety.checkpoint import load_language_model
from fedsafe.safety.classifier_scorer import (
    ClassifierScorer,
    class_ids,
    load_classifier,
    num_positions,
)
from fedsafe.safety.guard_format import GuardFormat, Question
from fedsafe.safety.next_token import NextTokenScorer, common_prefix
from fedsafe.safety.prompts import GuardPrompts, answer_tokens, label_ids
from fedsafe.safety.scorer import Scorer
from fedsafe.safety.vllm_scorer import VllmScorer
from fedsafe.types import Conversation, Role, Turn

MAX_ANSWER_TOKENS = 64
"""Tokens at which an answer that is searched for its label is cut off."""

_LARGEST_WINDOW = 8192
"""Tokens that are read of a conversation where the model could read more."""
_SEPARATOR_TOKENS = 4
_PROBE_TEXTS = ("a", "b")


class LoadedGuard(NamedTuple):
    """What judging needs in memory."""

    prompts: GuardPrompts
    scorer: Scorer
    label_ids: dict[Role, dict[str, int]]
    """Token (or class) of each label, for each question that is answered by one."""
    begun_ids: dict[Role, dict[str, list[int]]]
    """What stands before the kinds of harm: the whole label and the separator, as token ids."""


def load_guard(  # noqa: PLR0913
    format_: GuardFormat,
    *,
    model: str | None,
    adapter: Path | None,
    backend: Literal["transformers", "vllm"],
    dtype: torch.dtype,
    device: Literal["auto", "cpu", "cuda"],
    window: int | None,
    too_long: Literal["head_and_tail", "error"],
    categories: Mapping[str, str] | None,
    excluded_categories: Sequence[str],
    max_batch_tokens: int,
    share_prefix: bool,
) -> LoadedGuard:
    """Load a guard; see `GuardModel` for the arguments.

    Raises:
        ValueError: If it cannot be loaded, or does not fit its format.
    """
    positions = partial(_window, window, room=_room(format_))
    prompts = partial(
        GuardPrompts,
        format_,
        too_long=too_long,
        categories=categories,
        excluded_categories=excluded_categories,
    )
    if format_.loader == "classifier":
        name = _classifier_name(format_, model, adapter=adapter, backend=backend)
        network, tokenizer = load_classifier(name, dtype=dtype, device=_device(device))
        classes = {role: class_ids(question, network.config) for role, question in asked(format_)}
        return LoadedGuard(
            prompts(tokenizer, window=positions(num_positions(network))),
            ClassifierScorer(network, max_tokens=max_batch_tokens),
            classes,
            {},
        )
    if backend == "vllm":
        name = model or base_of(_known(adapter))
        tokenizer = load_tokenizer(name)
        length = positions(None) + _room(format_)
        vllm = VllmScorer(name, adapter, dtype=dtype, max_length=length)
        return _with_tokens(format_, prompts(tokenizer, window=positions(None)), vllm, tokenizer)
    checkpoint = load_language_model(
        model, loader=format_.loader, adapter=adapter, dtype=dtype, device=_device(device)
    )
    asking = prompts(checkpoint.tokenizer, window=positions(checkpoint.num_positions))
    scorer = NextTokenScorer(
        checkpoint.model,
        checkpoint.tokenizer,
        prefixes=_policies(format_, asking) if share_prefix else (),
        max_tokens=max_batch_tokens,
    )
    return _with_tokens(format_, asking, scorer, checkpoint.tokenizer)


def _classifier_name(
    format_: GuardFormat, model: str | None, *, adapter: Path | None, backend: str
) -> str:
    if backend == "vllm":
        raise ValueError(
            f"a guard of the format {format_.name} is a classifier, which vLLM does not run here; "
            "set backend: transformers"
        )
    if adapter is not None or model is None:
        raise ValueError(
            f"a guard of the format {format_.name} is a classifier, which takes no adapter "
            f"({adapter}); give its own checkpoint as model"
        )
    return model


def asked(format_: GuardFormat) -> Iterator[tuple[Role, Question]]:
    """The roles whose turns the guard can judge, and how it is asked about them."""
    if format_.user is not None:
        yield "user", format_.user
    if format_.assistant is not None:
        yield "assistant", format_.assistant


def _with_tokens(
    format_: GuardFormat,
    prompts: GuardPrompts,
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
) -> LoadedGuard:
    labelled = {role: each for role, each in asked(format_) if each.pattern is None}
    labels = {role: label_ids(format_, each, tokenizer) for role, each in labelled.items()}
    separator = format_.categories.separator if format_.categories is not None else ""
    ids = tokenizer(separator, add_special_tokens=False)["input_ids"] if separator else []
    begun = {
        role: {
            label: [*tokens, *ids]
            for label, tokens in answer_tokens(each, tokenizer).labels.items()
        }
        for role, each in labelled.items()
    }
    return LoadedGuard(prompts, scorer, labels, begun)


def _policies(format_: GuardFormat, prompts: GuardPrompts) -> list[list[int]]:
    """What all prompts of one question begin with, found by asking about two texts."""
    found = []
    for role, _ in asked(format_):
        for options in format_.risks.values() or [{}]:
            probes = [_probe(role, text) for text in _PROBE_TEXTS]
            found.append(common_prefix([p.ids for p in prompts.render(probes, options)]))
    return found


def _probe(role: Role, text: str) -> Conversation:
    turns: Conversation = [Turn(role="user", content=text)]
    return turns if role == "user" else [*turns, Turn(role="assistant", content=text)]


def _window(wanted: int | None, positions: int | None, *, room: int) -> int:
    """Tokens that a prompt may have, with `room` left for what the guard writes."""
    if wanted is None:
        return min(positions or _LARGEST_WINDOW, _LARGEST_WINDOW) - room
    if positions is not None and wanted > positions - room:
        raise ValueError(
            f"window is {wanted}, and the guard can read {positions} tokens, {room} of which are "
            f"its answer's; give at most {positions - room}"
        )
    return wanted


def _room(format_: GuardFormat) -> int:
    """Tokens of the longest answer."""
    if format_.loader == "classifier":
        return 0
    known = format_.categories
    named = known.max_tokens + _SEPARATOR_TOKENS if known and not known.in_label else 0
    searched = any(question.pattern is not None for _, question in asked(format_))
    return 1 + max(named, MAX_ANSWER_TOKENS if searched else 0)


def _known(adapter: Path | None) -> Path:
    assert adapter is not None, "a guard has a model or an adapter that names one"
    return adapter


def _device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda and no CUDA device is visible; set device: auto")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
