"""A model that ZeRO-3 splits while it is loaded: no GPU ever holds more than a part and a tensor.

Rank 0 makes the model on the CPU, as `sharded_load` has it; parameter after parameter goes to all
ranks, each keeps its part, and rank 0 drops the whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from fedsafe.model.sharded_load import decoder_layers, receive_skeleton
from fedsafe.peers import Peers


def build_partitioned(
    make: Callable[[], PeftModel],
    peers: Peers,
    *,
    settings: dict[str, Any],
    device: torch.device,
) -> PeftModel:
    """Make a model on one rank, and split it over all with ZeRO-3.

    Args:
        make: Makes the base with its adapter, whole and on the CPU.
        peers: All ranks.
        settings: DeepSpeed's.
        device: Where a tensor is whole while it is split.

    Raises:
        ValueError: On every rank, if the model could not be made on the first.
    """
    from deepspeed import zero
    from deepspeed.utils import set_z3_leaf_module

    model, values = receive_skeleton(make, peers)
    split: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        value = values.pop(name, None)
        if value is None:  # DeepSpeed sends rank 0's
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        split[parameter] = nn.Parameter(value.to(device), parameter.requires_grad)
        del value
        zero.Init(module=nn.ParameterList([split[parameter]]), config_dict_or_path=settings)
    _replace(model, split)
    for layer in decoder_layers(model):  # each comes together, and its gradients leave, at once
        set_z3_leaf_module(layer, True)
    return model


def require_gradients(model: nn.Module) -> RemovableHandle:
    """Let the input of the first layer have a gradient, until the handle is removed.

    DeepSpeed takes a layer's gradients away when that of its input is there.
    """

    def require(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            inputs[0].requires_grad_()

    return decoder_layers(model)[0].register_forward_pre_hook(require, prepend=True)


_torch_linear = functional.linear


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or weight.requires_grad:
        return _torch_linear(input, weight, bias)
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    output: Tensor = zero3_linear_wrap(input, weight, bias)
    return output


@contextmanager
def drops_frozen_weights() -> Iterator[None]:
    """Let the graph of a forward pass hold frozen weights by reference, not by value.

    torch's linear layer saves a view of its weight, which keeps it in memory after ZeRO-3 has put
    it away. DeepSpeed's own replacement saves the parameter, and rounds the gradients of trained
    weights otherwise than torch: here it stands in for frozen ones alone. The compiler saves
    parameters itself.
    """
    functional.linear = _linear
    try:
        yield
    finally:
        functional.linear = _torch_linear


def _replace(model: nn.Module, others: dict[nn.Parameter, nn.Parameter]) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, others[parameter])
