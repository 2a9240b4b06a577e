"""What a model does, found out on a few tokens instead of read from a list of known models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsafe.data.packing import Pack, pack

_FIRST, _OTHER, _SECOND = (1, 2, 3, 4), (4, 3, 2, 1), (2, 4, 1, 3)

Inputs = Callable[[Pack], dict[str, Any]]
"""The keyword arguments that the model is called with for a pack."""


@torch.no_grad()
def head_is_plain(base: Any, inputs: Inputs) -> bool:
    """Whether the logits are just ``hidden @ weight.T``, bit for bit, with a frozen weight.

    Some models cap or scale their logits, or have a bias.

    Args:
        base: A causal language model of transformers, in evaluation mode.
        inputs: How to call it.
    """
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or _is_trained(head):
        return False
    probe = inputs(_probe(_FIRST, _SECOND, device=_device_of(base)))
    return torch.equal(head(_hidden(base, probe)), base(**probe).logits)


@torch.no_grad()
def check_isolation(base: Any, inputs: Inputs) -> None:
    """Change one sample of a pack, and see that the other one does not notice.

    Args:
        base: A causal language model of transformers, in evaluation mode.
        inputs: How to call it.

    Raises:
        ValueError: If it does: the model mixes tokens other than through the attention that was
            asked for, by convolution or recurrence for instance, or ignores the boundaries.
    """
    device = _device_of(base)
    hidden = _hidden(base, inputs(_probe(_FIRST, _SECOND, device=device)))
    changed = _hidden(base, inputs(_probe(_OTHER, _SECOND, device=device)))
    second = slice(len(_FIRST), None)
    difference = (hidden[:, second] - changed[:, second]).abs().max()
    if difference > torch.finfo(hidden.dtype).eps ** 0.5 * hidden.abs().max():
        raise ValueError(
            f"{type(base).__name__} lets packed samples see each other with attention "
            f"{base.config._attn_implementation!r}; choose another attention or another base"
        )


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _hidden(base: Any, inputs: dict[str, Any]) -> Tensor:
    hidden = base.base_model(**inputs).last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden


def _probe(*samples: tuple[int, ...], device: torch.device) -> Pack:
    packed = pack([(np.array(s, dtype=np.int32), np.ones(len(s), dtype=np.bool_)) for s in samples])
    packed.input_ids = packed.input_ids.to(device)
    packed.position_ids = packed.position_ids.to(device)
    return packed
