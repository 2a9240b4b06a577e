"""Attention over packed samples: each segment attends to itself alone.

transformers isolates packed samples by a dense mask that it derives from `position_ids`, and
silently does not when a cache is in use. Here the boundaries are an argument, a forward pass
without them is refused, and the cost is the sum of the squared lengths instead of the square of
their sum.

Keys and values may begin with those of a prefix that all samples share (a cache of it, computed
once): every token then sees the prefix too.

On a GPU in half precision one flash kernel takes all segments; elsewhere they go one by one.

Shapes: H heads, T tokens of the pack, P tokens of the shared prefix, L tokens of one sample, D head
size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends.cuda import is_flash_attention_available
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

PACKED = "fedsafe_packed"

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""What some layers ask for beyond plain attention: capped scores, sinks, a bias."""
_LARGEST_FLASH_HEAD = 256
"""Numbers of a head that the flash kernel can take; they must be a multiple of 8."""


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention by torch's own kernels, where nearly every call has lengths of its own.

    On newer GPUs cuDNN comes first, and it plans anew for each shape: some 35 ms on an H100.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of a packed row.

    Args:
        module: The attention layer that calls.
        query: Shape ``(1, H, T, D)``.
        key: Shape ``(1, H_kv, P + T, D)``; H_kv divides H (grouped queries).
        value: As `key`.
        attention_mask: Must be None.
        dropout: Probability of dropping an attention weight.
        scaling: Factor on the scores; None is ``D ** -0.5``.
        segment_lengths: Tokens of each sample in the row.
        **kwargs: Further settings of the layer; only those that change nothing here are accepted.

    Returns:
        ``(output, None)``, the output of shape ``(1, T, H, D)``.

    Raises:
        ValueError: If the boundaries are missing, or the layer asks for attention of another kind.
    """
    if segment_lengths is None or attention_mask is not None:
        raise ValueError(
            "packed attention needs segment_lengths and no attention_mask; call "
            "model.set_attn_implementation('sdpa') before generation or padded batches"
        )
    _refuse_unsupported(module, kwargs)
    lengths = list(segment_lengths)
    window: int | None = kwargs.get("sliding_window")
    if key.shape[2] > query.shape[2]:
        if window is not None:
            raise ValueError(
                f"a shared prefix and a sliding window of {window} tokens do not go together; "
                "leave the prefix uncached for this model"
            )
        with_prefix = _flash_with_prefix if _has_flash_kernel(query) else _attend_with_prefix
        return with_prefix(query, key, value, lengths, scaling), None
    within = _flash_within if _has_flash_kernel(query) else _attend_within
    return within(query, key, value, lengths, window=window, dropout=dropout, scaling=scaling), None


# ---- one kernel for all segments -----------------------------------------------------------------


def _has_flash_kernel(query: Tensor) -> bool:
    """Whether the kernel for segments of any length runs here; it knows half precision alone."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= _LARGEST_FLASH_HEAD
        and query.shape[-1] % 8 == 0
        and is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: list[int],
    *,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """As `_attend_within`."""
    ends, longest = _ends(tuple(segment_lengths), query.device), max(segment_lengths)
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    return _flash_kernel(q, k, v, ends, ends, longest, longest, dropout, scaling, window)[None]


def _flash_with_prefix(
    query: Tensor, key: Tensor, value: Tensor, segment_lengths: list[int], scaling: float | None
) -> Tensor:
    """As `_attend_with_prefix`; the prefix is copied in front of each segment."""
    prefix = key.shape[2] - query.shape[2]
    lengths, longest, device = tuple(segment_lengths), max(segment_lengths), query.device
    places = _places_behind_prefix(lengths, prefix, device)
    ends = _ends(lengths, device)
    ends_behind_prefix = _ends(tuple(prefix + length for length in lengths), device)
    keys, values = (each[0].transpose(0, 1).index_select(0, places) for each in (key, value))
    return _flash_kernel(
        query[0].transpose(0, 1),
        keys,
        values,
        ends,
        ends_behind_prefix,
        longest,
        prefix + longest,
        0.0,
        scaling,
        None,
    )[None]


def _flash_kernel(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention within segments, shape ``(T, H, D)``; the last query sees the last key.

    `torch.nn.attention.varlen` is made of this operator too, with arguments that differ from one
    version of torch to the next, and without dropout.
    """
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        dropout,
        is_causal=True,
        return_debug_mask=False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return output


@lru_cache(maxsize=4)
@torch.inference_mode(mode=False)  # validation's tensors would be of no use in training
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """0 and the end of each segment; copied to the device once for all layers."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache(maxsize=1)
@torch.inference_mode(mode=False)
def _places_behind_prefix(lengths: tuple[int, ...], prefix: int, device: torch.device) -> Tensor:
    """Places of the prefix and the first segment, of the prefix and the second one, and so on."""
    shared = torch.arange(prefix)
    own = torch.arange(prefix, prefix + sum(lengths)).split(lengths)
    return torch.cat([part for each in own for part in (shared, each)]).to(device)


# ---- segment by segment --------------------------------------------------------------------------


@without_cudnn()
def _attend_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: list[int],
    *,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Attention of each segment to itself alone, shape ``(1, T, H, D)``."""
    grouped = key.shape[1] != query.shape[1]
    outputs = []
    for q, k, v in zip(
        query.split(segment_lengths, 2),
        key.split(segment_lengths, 2),
        value.split(segment_lengths, 2),
        strict=True,
    ):
        mask = _window_mask(q, window) if window is not None and q.shape[2] > window else None
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                scale=scaling,
                is_causal=mask is None,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


@without_cudnn()
def _attend_with_prefix(
    query: Tensor, key: Tensor, value: Tensor, segment_lengths: list[int], scaling: float | None
) -> Tensor:
    """Attention of each segment to the shared prefix and, causally, to itself; for inference.

    Returns:
        Shape ``(1, T, H, D)``.
    """
    # the CPU's fused kernel multiplies bfloat16 slowly; plain products are faster there
    plain = query.device.type == "cpu" and query.dtype is torch.bfloat16
    attend = _plain_attention if plain else _fused_attention
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    segments = _with_prefix(key, value, segment_lengths)
    outputs = [
        attend(q, k, v, scale)
        for q, (k, v) in zip(query.split(segment_lengths, 2), segments, strict=True)
    ]
    return torch.cat(outputs, 1)


def _with_prefix(
    key: Tensor, value: Tensor, segment_lengths: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each segment after those of the prefix, shape ``(1, H_kv, P + L, D)``."""
    prefix = key.shape[2] - sum(segment_lengths)
    start = prefix
    for length in segment_lengths:
        own = slice(start, start + length)
        yield (
            torch.cat([key[:, :, :prefix], key[:, :, own]], 2),
            torch.cat([value[:, :, :prefix], value[:, :, own]], 2),
        )
        start += length


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of the last L of P + L tokens, shape ``(1, L, H, D)``."""
    output = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal_lower_right(query.shape[2], key.shape[2]),  # lets a GPU's flash kernel run
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output.transpose(1, 2)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same; heads that share keys become more queries of one head."""
    _, num_heads, length, size = query.shape
    num_kv = key.shape[1]
    folded = (query * scale).reshape(num_kv, -1, size)
    scores = torch.bmm(folded, key[0].transpose(1, 2)).view(num_heads, length, -1)
    weights = scores.masked_fill_(_future(query, key), -torch.inf).softmax(-1)
    output = torch.bmm(weights.view(num_kv, -1, key.shape[2]), value[0])
    return output.view(1, num_heads, length, size).transpose(1, 2)


def _future(query: Tensor, key: Tensor) -> Tensor:
    """True where a key comes after a query; shape ``(L, P + L)``."""
    length, total = query.shape[2], key.shape[2]
    ones = torch.ones(length, total, dtype=torch.bool, device=query.device)
    return ones.triu(total - length + 1)


def _refuse_unsupported(module: nn.Module, kwargs: dict[str, Any]) -> None:
    unknown = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(
            f"packed attention has no {unknown[0]}, which {type(module).__name__} asks for; "
            "set model.attention to 'eager' for this model"
        )


def _window_mask(query: Tensor, window: int) -> Tensor:
    """Causal mask that reaches back `window` tokens, the own one counted; shape ``(T, T)``."""
    positions = torch.arange(query.shape[2], device=query.device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


# No mask function is registered under this name: transformers then builds no mask at all.
# Compilers are kept out: they would make a graph for every list of lengths.
AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
