"""Answers to conversations: batched generation that leaves the model as it was."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedsafe.model.attention import PACKED
from fedsafe.types import Conversation

Model = PreTrainedModel | PeftModel
Prompt = TypeVar("Prompt", str, list[int])


def generate_answers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 512,
) -> list[str]:
    """The model's next turn in each conversation.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer, with a chat template and an end-of-sequence token.
        conversations: Each ends with a user's turn.
        max_new_tokens: Tokens at which an answer is cut off; earlier where the model has no more
            positions.
        temperature: 0 for the likeliest token each time; above 0 to sample.
        seed: Seed of the sampling; the global random state is left alone.
        batch_size: Conversations generated at a time; those of like length together.

    Returns:
        One answer a conversation, in order, without special tokens.

    Raises:
        ValueError: If a prompt alone is longer than the model can read.
    """
    prompts = [
        str(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True))  # type: ignore[arg-type]
        for c in conversations
    ]
    generate = partial(
        _generate_batch, model, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature
    )
    with _generating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        return _in_batches(generate, prompts, batch_size=batch_size)


def _generate_batch(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[str]:
    encoded = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return _continue_batch(
        model, tokenizer, encoded, max_new_tokens=max_new_tokens, temperature=temperature
    )


def continue_prompts(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """The likeliest continuation of each prompt of token ids, without special tokens.

    Raises:
        ValueError: If a prompt alone is longer than the model can read.
    """
    generate = partial(
        _continue_batch, model, tokenizer, max_new_tokens=max_new_tokens, temperature=0.0
    )
    with _generating(model):
        return _in_batches(generate, [list(each) for each in prompts], batch_size=batch_size)


def _in_batches(
    generate: Callable[[list[Prompt]], list[str]], prompts: Sequence[Prompt], *, batch_size: int
) -> list[str]:
    """What is generated for each prompt, in order; those of like length are batched together."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for begin in range(0, len(prompts), batch_size):
        rows = by_length[begin : begin + batch_size]
        batch = generate([prompts[row] for row in rows])
        for row, text in zip(rows, batch, strict=True):
            texts[row] = text
    return texts


def _continue_batch(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[str]:
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids_BT, mask_BT = _pad_left(encoded, filler or 0)  # noqa: N806
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output_BT = model.generate(  # type: ignore[operator]  # noqa: N806
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=min(max_new_tokens, _room(model, ids_BT.shape[1])),
        pad_token_id=filler,
        eos_token_id=_end_tokens(model, tokenizer),
        **sampling,
    )
    new_BT = output_BT[:, ids_BT.shape[1] :]  # noqa: N806
    return [str(text) for text in tokenizer.batch_decode(new_BT, skip_special_tokens=True)]


def _end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokenizer's end and the model's own: some end a turn with a token besides."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends) or None


def _pad_left(rows: Sequence[list[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Token ids that all end in the last column, and 1 where they are; shape ``(B, T)``.

    By hand, because a tokenizer without a padding token would have to be given one.
    """
    longest = max(len(row) for row in rows)
    ids_BT = torch.tensor([[filler] * (longest - len(row)) + row for row in rows])  # noqa: N806
    mask_BT = torch.tensor(  # noqa: N806
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    )
    return ids_BT, mask_BT


def _room(model: Model, num_prompt_tokens: int) -> int:
    """Tokens that an answer may have before the model runs out of positions."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return sys.maxsize
    if num_prompt_tokens >= positions:
        raise ValueError(
            f"a prompt has {num_prompt_tokens} tokens and the model {positions} positions; "
            "shorten the prompt"
        )
    return positions - num_prompt_tokens


@contextmanager
def _generating(model: Model) -> Iterator[None]:
    """Evaluation mode without gradients, and attention that knows padding and a cache."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    attention = base.config._attn_implementation
    modes = [(module, module.training) for module in model.modules()]  # they need not be the same
    if attention == PACKED:
        base.set_attn_implementation("sdpa")
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        if attention == PACKED:
            base.set_attn_implementation(PACKED)
