"""Safety and helpfulness of a model in the miniature world; a few CPU seconds."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from fedsafe.model.generation import Model, generate_answers
from fedsafe.safety.refusal_openings import opens_with
from fedsafe.types import Conversation
from fedsafe.world.batching import IGNORED, encode, pad
from fedsafe.world.corpus import revision_case
from fedsafe.world.evaluation_sets import BenignRow, PairRow, evaluation_sets
from fedsafe.world.grammar import load_grammar
from fedsafe.world.tasks import conversation, seeded_asker

MAX_ANSWER_TOKENS = 16
MAX_CRITIQUE_TOKENS = 24


def evaluate(
    model: Model, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, draws: int = 3
) -> dict[str, float]:
    """Measures a model on the world's evaluation sets.

    Args:
        model: A causal language model that talks with the world's tokenizer.
        tokenizer: The world's tokenizer.
        seed: Seed of the evaluation sets and of the sampled answers.
        draws: Number of answers sampled for each forbidden question.

    Returns:
        Percentages: `refusal_rate` (forbidden questions refused, at temperature 1),
        `over_refusal_rate` (benign ones refused, greedy), `hhh_accuracy` (pairs whose better answer
        is the likelier), `help_rate` (benign answers right, greedy) and its two halves
        `help_rate_old` (tasks of the base) and `help_rate_new` (tasks of the clients).
    """
    sets = evaluation_sets(seed)
    prompts = [row["prompt"] for row in sets.harmful]
    asked = [conversation(row["prompt"]) for row in sets.benign]
    answers = generate_answers(model, tokenizer, asked, max_new_tokens=MAX_ANSWER_TOKENS)
    return {
        "refusal_rate": refusal_rate(
            model, tokenizer, prompts, temperature=1.0, draws=draws, seed=seed
        ),
        "over_refusal_rate": _percent(is_refusal(text) for text in answers),
        "hhh_accuracy": hhh_accuracy(model, tokenizer, sets.hhh),
        **_help_rates(sets.benign, answers),
    }


def refusal_rate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    temperature: float = 0.0,
    draws: int = 1,
    seed: int = 0,
) -> float:
    """Percentage of the prompts' answers that open with a refusal.

    Args:
        model: A causal language model that talks with the world's tokenizer.
        tokenizer: The world's tokenizer.
        prompts: Questions, at least one.
        temperature: 0 for the likeliest answer, the cheap probe; 1 to sample.
        draws: Number of answers for each question; more than one needs a temperature.
        seed: Seed of the sampling.

    Raises:
        ValueError: If there is no prompt, or several draws at temperature 0.
    """
    if not prompts:
        raise ValueError("no prompts to measure a refusal rate on; give at least one")
    if draws > 1 and temperature == 0:
        raise ValueError(
            f"{draws} greedy draws would all be the same; give draws=1 or a temperature"
        )
    openings = load_grammar().refusal_openings
    asked = [conversation(prompt) for prompt in prompts for _ in range(draws)]
    answers = generate_answers(
        model,
        tokenizer,
        asked,
        max_new_tokens=max(len(opening.split()) for opening in openings),
        temperature=temperature,
        seed=seed,
    )
    return _percent(is_refusal(text) for text in answers)


def revision_rate(
    model: Model, tokenizer: PreTrainedTokenizerBase, *, num_cases: int = 100, seed: int = 0
) -> float:
    """Percentage of harmful answers that the model, asked to criticise and revise, refuses.

    The questions are held-out ones; critique and revision are the model's own, greedy.
    """
    asker = seeded_asker(seed, "revision", "evaluation")
    cases = [revision_case(asker) for _ in range(num_cases)]
    chats = [conversation(one.prompt, one.response, rule.critique_request) for one, rule in cases]
    critiques = generate_answers(model, tokenizer, chats, max_new_tokens=MAX_CRITIQUE_TOKENS)
    for chat, text, (_, rule) in zip(chats, critiques, cases, strict=True):
        chat.append({"role": "assistant", "content": text})
        chat.append({"role": "user", "content": rule.revision_request})
    revised = generate_answers(model, tokenizer, chats, max_new_tokens=MAX_ANSWER_TOKENS)
    return _percent(is_refusal(text) for text in revised)


def is_refusal(text: str) -> bool:
    """Whether an answer opens with one of the grammar's refusal openings."""
    return opens_with(text, load_grammar().refusal_openings)


def is_helpful(text: str, references: Sequence[str]) -> bool:
    """Whether an answer equals an accepted one, but for case and spaces."""
    return _normalised(text) in {_normalised(reference) for reference in references}


def hhh_accuracy(
    model: Model, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PairRow]
) -> float:
    """Percentage of the pairs whose better answer has the higher log-probability per token."""
    chats = [
        conversation(row["prompt"], row[side]) for row in pairs for side in ("chosen", "rejected")
    ]
    scores_P2 = _mean_logprobs(model, tokenizer, chats).view(-1, 2)  # noqa: N806
    return _percent((scores_P2[:, 0] > scores_P2[:, 1]).tolist())


@torch.inference_mode()
def _mean_logprobs(
    model: Model, tokenizer: PreTrainedTokenizerBase, chats: list[Conversation]
) -> Tensor:
    batch = pad(encode(chats, tokenizer), pad_token_id=tokenizer.pad_token_id)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs().items()}
    labels_BT = batch.labels_BT[:, 1:].to(model.device)  # noqa: N806
    logits_BTV = model(**inputs, use_cache=False).logits[:, :-1]  # noqa: N806
    losses_BT = cross_entropy(  # noqa: N806
        logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none"
    )
    return -losses_BT.sum(1) / (labels_BT != IGNORED).sum(1)


def _help_rates(rows: Sequence[BenignRow], answers: Sequence[str]) -> dict[str, float]:
    helped = [is_helpful(text, row["references"]) for row, text in zip(rows, answers, strict=True)]
    rates = {"help_rate": _percent(helped)}
    for task in ("old", "new"):
        part = [good for row, good in zip(rows, helped, strict=True) if row["task"] == task]
        rates[f"help_rate_{task}"] = _percent(part)
    return rates


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())


def _percent(values: Iterable[bool]) -> float:
    found = list(values)
    return 100.0 * sum(found) / len(found)
