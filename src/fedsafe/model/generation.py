"""Answers to conversations: batched generation that leaves the model as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedsafe.model.attention import PACKED
from fedsafe.types import Conversation

Model = PreTrainedModel | PeftModel


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
        max_new_tokens: Tokens at which an answer is cut off.
        temperature: 0 for the likeliest token each time; above 0 to sample.
        seed: Seed of the sampling; the global random state is left alone.
        batch_size: Conversations generated at a time; those of like length together.

    Returns:
        One answer a conversation, in order, without special tokens.
    """
    prompts = [
        str(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True))  # type: ignore[arg-type]
        for c in conversations
    ]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    with _generating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for begin in range(0, len(prompts), batch_size):
            rows = by_length[begin : begin + batch_size]
            texts = _generate_batch(
                model,
                tokenizer,
                [prompts[row] for row in rows],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
    return answers


def _generate_batch(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[str]:
    pad = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = pad
    inputs = tokenizer(
        prompts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
    ).to(model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output_BT = model.generate(  # type: ignore[operator]  # noqa: N806
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    new_BT = output_BT[:, inputs["input_ids"].shape[1] :]  # noqa: N806
    return [str(text) for text in tokenizer.batch_decode(new_BT, skip_special_tokens=True)]


@contextmanager
def _generating(model: Model) -> Iterator[None]:
    """Evaluation mode without gradients, and attention that knows padding and a cache."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    attention = base.config._attn_implementation
    was_training = model.training
    if attention == PACKED:
        base.set_attn_implementation("sdpa")
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if attention == PACKED:
            base.set_attn_implementation(PACKED)
