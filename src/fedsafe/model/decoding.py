"""What follows prompts of token ids: rows of like length go through the model together.

A row depends on its prompt and its seed, not on the rows beside it, but for rounding: in bfloat16
that differs between batch sizes and may turn a close call.
"""

import inspect
import sys
from collections.abc import Sequence

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from fedsafe.model.continuation import Continuation, Model, Prompt, base_of, num_positions
from fedsafe.model.grouping import of_like_length
from fedsafe.model.rereading import continue_rereading
from fedsafe.model.row_batch import continue_batch

_PADDING_CPU, _PADDING_GPU = 16384, 131072
"""Columns of padding whose keys cost about as much as another pass through the model."""


def continue_all(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    ends: frozenset[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    max_rows: int = sys.maxsize,
    remember: bool = False,
) -> list[Continuation]:
    """What follows each prompt, in order; those of like length are batched together.

    Args:
        model: In evaluation mode, without gradients, with attention that knows padding.
        prompts: Each leaves a position for an answer.
        ends: Tokens that end a row.
        max_new_tokens: Tokens at which a row is cut off, 1 or more; earlier where the model has no
            more positions.
        temperature: 0 for the likeliest token each time; above 0 to sample.
        max_rows: Rows of a batch.
        remember: Whether the continuations carry what was read.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
    positions = num_positions(model)
    limits = [min(max_new_tokens, positions - len(prompt.ids)) for prompt in prompts]
    assert all(prompt.ids for prompt in prompts)
    assert min(limits, default=1) > 0
    lengths = [len(prompt.ids) for prompt in prompts]
    groups = of_like_length(lengths, max_rows=max_rows, max_padding=_max_padding(model))
    can_remember = has_plain_memory(model)
    found: dict[int, Continuation] = {}
    for places in groups:
        if can_remember:
            batch, cuts = [prompts[i] for i in places], [limits[i] for i in places]
            answers = continue_batch(
                model, batch, cuts, ends=ends, temperature=temperature, remember=remember
            )
            found.update(zip(places, answers, strict=True))
            continue
        for limit in {limits[i] for i in places}:  # `generate` has one for all
            some = [i for i in places if limits[i] == limit]
            batch = [prompts[i] for i in some]
            answers = continue_rereading(model, batch, limit, ends=ends, temperature=temperature)
            found.update(zip(some, answers, strict=True))
    return [found[place] for place in range(len(prompts))]


def has_plain_memory(model: Model) -> bool:
    """Whether what the model keeps of a token are keys and values that all later tokens see.

    Not so with sliding windows and recurrent layers, nor where attention counts columns because
    it is given no positions, nor where a token is turned by an angle that the length changes.
    """
    base = base_of(model)
    takes = inspect.signature(base.forward).parameters
    if base._is_stateful or "position_ids" not in takes or "logits_to_keep" not in takes:
        return False
    if "local" in getattr(base.config, "attention_layers", ()):  # GPT-Neo's sliding windows
        return False
    if _turns_by_length(base.config.get_text_config()):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=base.config).layers)


def _turns_by_length(config: PreTrainedConfig) -> bool:
    """Whether the longest row of a batch decides the rotary angles of all."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # one a layer type
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _max_padding(model: Model) -> int:
    base = base_of(model)
    # some carry the padding along, whatever the mask
    if base._is_stateful or _turns_by_length(base.config.get_text_config()):
        return 0
    return _PADDING_CPU if model.device.type == "cpu" else _PADDING_GPU
