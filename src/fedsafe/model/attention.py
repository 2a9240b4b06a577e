"""Attention over packed samples: each segment attends to itself alone.

transformers isolates packed samples by a dense mask that it derives from `position_ids`, and
silently does not when a cache is in use. Here the boundaries are an argument, a forward pass
without them is refused, and the cost is the sum of the squared lengths instead of the square of
their sum.

Shapes: H heads, T tokens of the pack, D head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

PACKED = "fedsafe_packed"

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""What some layers ask for beyond plain attention: capped scores, sinks, a bias."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of a packed row.

    Args:
        module: The attention layer that calls.
        query: Shape ``(1, H, T, D)``.
        key: Shape ``(1, H_kv, T, D)``; H_kv divides H (grouped queries).
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
    window: int | None = kwargs.get("sliding_window")
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
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


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
AttentionInterface.register(PACKED, packed_attention)
