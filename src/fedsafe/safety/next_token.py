"""Probabilities of the next token after many prompts: one forward pass each, nothing generated.

What a guard reads begins with its policy, the same hundreds of tokens for every conversation. Their
keys and values are computed once and kept; the rest of the prompts is packed without padding and
attends to them (`model.attention`). Models that compute attention in a way of their own get padded
batches instead: which way gives the model's own probabilities is found out on a few tokens.

Shapes: B prompts of a batch, T tokens, V tokens of the vocabulary.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from fedsafe.data.packing import split_by_budget
from fedsafe.model.attention import PACKED
from fedsafe.model.generation import Model, continue_prompts
from fedsafe.safety.scorer import Scorer

_SHORTEST_PREFIX = 16
"""Tokens below which keeping a prefix is not worth a cache."""
_PROBES = ((5, 7, 4, 6, 8), (6, 4, 8), (7, 5))
"""Token ids below the smallest vocabulary; what they mean is all the same."""
_PROBE_PREFIX = (8, 6, 5, 7, 4) * 5

Prompts = Sequence[Sequence[int]]


class Prefix(NamedTuple):
    """The beginning that prompts share, as the model has read it."""

    ids: tuple[int, ...]
    cache: Any
    """Its keys and values; None without a prefix."""
    reach: int = sys.maxsize
    """Tokens up to which a prompt may go on from the cache: the smallest window of a layer."""


_NO_PREFIX = Prefix((), None)


Way = Callable[[Model, Prefix, Prompts], Tensor]
"""Next-token logits after each prompt (given without the prefix), shape ``(B, V)``."""


class NextTokenScorer(Scorer):
    """Scores prompts with a causal language model.

    Args:
        model: In evaluation mode; its attention implementation is changed while it scores.
        tokenizer: For the words of `answers`.
        prefixes: Beginnings that prompts share, as token ids, to be read once; a prompt with none
            of them is read whole.
        max_tokens: Tokens of a batch, padding and copies of the prefix counted.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        *,
        prefixes: Prompts = (),
        max_tokens: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._way, can_share = _find_way(model)
        worth = {tuple(ids) for ids in prefixes if can_share and len(ids) >= _SHORTEST_PREFIX}
        longest_first = sorted(worth, key=len, reverse=True)
        self._prefixes = [_read_prefix(model, ids) for ids in longest_first]

    @torch.no_grad()
    def label_probabilities(self, prompts: Prompts, label_ids: Sequence[int]) -> Tensor:
        """See `Scorer`."""
        probabilities = torch.empty(len(prompts), len(label_ids))
        for prefix, rows in self._by_prefix(prompts):
            rests = [prompts[row][len(prefix.ids) :] for row in rows]
            padded = self._way is padded_logits
            copied = len(prefix.ids) if padded else 0  # each row has a copy of the prefix
            lengths = np.array([copied + len(rest) for rest in rests], dtype=np.int32)
            for group in split_by_budget(lengths, max_tokens=self._max_tokens, padded=padded):
                logits_BV = self._way(self._model, prefix, [rests[i] for i in group])  # noqa: N806
                labels = logits_BV.float().softmax(-1)[:, list(label_ids)]
                probabilities[[rows[i] for i in group]] = labels.cpu()
        return probabilities

    def answers(self, prompts: Prompts, *, max_new_tokens: int) -> list[str]:
        """See `Scorer`."""
        return continue_prompts(
            self._model, self._tokenizer, prompts, max_new_tokens=max_new_tokens
        )

    def _by_prefix(self, prompts: Prompts) -> Iterator[tuple[Prefix, list[int]]]:
        """The prompts that begin with each prefix and go on, then those without one."""
        left = list(range(len(prompts)))
        for prefix in self._prefixes:
            size = len(prefix.ids)
            rows = [
                row
                for row in left
                if size < len(prompts[row]) <= prefix.reach
                and tuple(prompts[row][:size]) == prefix.ids
            ]
            if rows:
                yield prefix, rows
                left = sorted(set(left) - set(rows))
        if left:
            yield _NO_PREFIX, left


def common_prefix(prompts: Prompts) -> list[int]:
    """The token ids that all prompts begin with."""
    same = takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    return [ids[0] for ids in same]


# ---- ways to score ---------------------------------------------------------------------------


def packed_logits(model: Model, prefix: Prefix, prompts: Prompts) -> Tensor:
    """Prompts end to end in one row, each sees the prefix and itself."""
    if model._is_stateful:
        raise ValueError("a state is carried from each prompt to the next, whatever the attention")
    if prefix.reach < sys.maxsize:
        raise ValueError("a cache with a sliding window drops the beginning of the prefix")
    lengths = [len(prompt) for prompt in prompts]
    begin = len(prefix.ids)
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(begin, begin + length) for length in lengths])
    try:
        with _attention(model, PACKED):
            output = model(
                input_ids=ids[None].to(model.device),
                position_ids=positions[None].to(model.device),
                past_key_values=prefix.cache,
                use_cache=prefix.cache is not None,
                segment_lengths=lengths,
                logits_to_keep=torch.tensor(lengths).cumsum(0).to(model.device) - 1,
            )
    finally:  # after an error too, or the next prompts would see these
        if prefix.cache is not None:
            _crop(prefix.cache, begin)
    logits: Tensor = output.logits[0]
    return logits


def padded_logits(model: Model, prefix: Prefix, prompts: Prompts) -> Tensor:
    """Prompts in rows padded on the left, each with its copy of the prefix in front."""
    begin, longest = len(prefix.ids), max(len(prompt) for prompt in prompts)
    if begin + longest > prefix.reach:
        raise ValueError("a sliding window counts the padding between a prefix and its prompt")
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)  # noqa: N806
    mask_BT = torch.ones(len(prompts), begin + longest, dtype=torch.long)  # noqa: N806
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, begin : begin + longest - len(prompt)] = 0
    cache = copy.deepcopy(prefix.cache)
    if cache is not None:
        cache.batch_repeat_interleave(len(prompts))
    positions = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, begin:]
    output = model(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        position_ids=positions.to(model.device),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _read_prefix(model: Model, ids: tuple[int, ...]) -> Prefix:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(
            input_ids=torch.tensor([list(ids)], device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    layers: list[Any] = [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]
    windows = [layer.sliding_window for layer in layers]
    return Prefix(ids, cache, min(windows, default=sys.maxsize))


def _crop(cache: Any, length: int) -> None:
    """Leave the first `length` tokens in every layer."""
    for layer in cache.layers:
        layer.crop(min(0, length - layer.get_seq_length()))


@torch.no_grad()
def _find_way(model: Model) -> tuple[Way, bool]:
    """The fastest way whose logits are the model's own, and whether it can share a prefix."""
    plain = [_own_logits(model, [*_PROBE_PREFIX, *probe]) for probe in _PROBES]
    expected_BV = torch.cat(plain)  # noqa: N806
    if not expected_BV.isfinite().all():
        raise ValueError(
            f"{type(model).__name__} computes NaN; try dtype float32, and check its weights"
        )
    tolerance = 8 * torch.finfo(expected_BV.dtype).eps ** 0.75 * expected_BV.abs().max()
    for way in (packed_logits, padded_logits):
        for shares in (True, False):
            try:
                found_BV = _probe(model, way, shares)  # noqa: N806
            except (ValueError, TypeError, AttributeError, RuntimeError):
                continue  # the model does not take what this way gives it
            agrees = (found_BV - expected_BV).abs().max() <= tolerance
            if agrees and _keeps_apart(model, way, shares, found_BV):
                return way, shares
    raise ValueError(
        f"{type(model).__name__} gives other probabilities to prompts in a batch than to one "
        "alone; use another guard, or the backend vllm"
    )


def _keeps_apart(model: Model, way: Way, shares: bool, found_BV: Tensor) -> bool:  # noqa: N803
    """Whether a prompt does not notice another one that changes; rounding cannot hide it."""
    changed = [tuple(reversed(_PROBES[0])), *_PROBES[1:]]
    others_BV = _probe(model, way, shares, changed)[1:]  # noqa: N806
    tolerance = torch.finfo(found_BV.dtype).eps * found_BV.abs().max()
    return bool((others_BV - found_BV[1:]).abs().max() <= tolerance)


def _probe(model: Model, way: Way, shares: bool, probes: Prompts = _PROBES) -> Tensor:
    if shares:
        return way(model, _read_prefix(model, _PROBE_PREFIX), probes)
    return way(model, _NO_PREFIX, [[*_PROBE_PREFIX, *probe] for probe in probes])


def _own_logits(model: Model, ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(
        input_ids=torch.tensor([ids], device=model.device), use_cache=False
    ).logits[:, -1]
    return logits


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:  # some models only warn
        raise ValueError(f"{type(model).__name__} has no attention but its own")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
