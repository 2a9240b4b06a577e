"""Continuations by transformers' own `generate`, which reads each prompt whole.

For models whose keys and values cannot be kept, cropped and put side by side: sliding windows,
recurrent layers, attention that counts columns instead of positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fedsafe.model.continuation import Continuation, Model, Prompt, base_of
from fedsafe.model.sampling import checked, draws, next_tokens


def continue_rereading(
    model: Model,
    prompts: Sequence[Prompt],
    limit: int,
    *,
    ends: frozenset[int],
    temperature: float,
) -> list[Continuation]:
    """What follows each prompt of a batch.

    Args:
        model: In evaluation mode.
        prompts: The batch.
        limit: Tokens at which a row is cut off, 1 or more.
        ends: Tokens that end a row.
        temperature: 0 for the likeliest token each time; above 0 to sample.
    """
    ids_BT, mask_BT = pad_left([prompt.ids for prompt in prompts])  # noqa: N806
    pick = _OwnDraws([prompt.seed for prompt in prompts], limit, temperature)
    with _without_own_settings(model) as base:
        output_BT = base.generate(  # noqa: N806
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            max_new_tokens=limit,
            pad_token_id=min(ends, default=0),
            eos_token_id=sorted(ends) or None,
            do_sample=False,
            logits_processor=LogitsProcessorList([pick]),
        )
    rows = output_BT[:, ids_BT.shape[1] :].tolist()
    cut = [_until_end(row, ends) for row in rows]
    return [
        Continuation(ids, ids[-1] in ends, len(prompt.ids))
        for ids, prompt in zip(cut, prompts, strict=True)
    ]


@contextmanager
def _without_own_settings(model: Model) -> Iterator[Any]:
    """The base without its checkpoint's penalties, beams and the like.

    `generate` takes from there whatever it is not told, from a configuration handed to it too.
    """
    base = base_of(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield base
    finally:
        base.generation_config = own


def pad_left(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids that all end in the last column, and 1 where they are; shape ``(B, T)``.

    By hand, because a tokenizer without a padding token would have to be given one.
    """
    longest = max(len(row) for row in rows)
    ids_BT = torch.tensor([[0] * (longest - len(row)) + row for row in rows])  # noqa: N806
    mask_BT = torch.tensor(  # noqa: N806
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    )
    return ids_BT, mask_BT


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    last = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: last + 1]


class _OwnDraws(LogitsProcessor):
    """Leaves each row the one token that `next_tokens` gives."""

    def __init__(self, seeds: Sequence[int | tuple[int, ...]], num_tokens: int, temperature: float):
        self._draws_BK = draws(seeds, num_tokens) if temperature > 0 else None
        self._temperature = temperature
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws_B = None  # noqa: N806
        if self._draws_BK is not None:
            draws_B = self._draws_BK[:, self._step].to(scores.device)  # noqa: N806
        self._step += 1
        chosen = next_tokens(scores, draws_B, self._temperature)
        checked(chosen)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)
