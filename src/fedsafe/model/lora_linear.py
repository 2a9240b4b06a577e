"""LoRA on linear layers with half-precision weights, without a detour through float32.

PEFT casts the whole input to the adapter's float32 and the result back: on a GPU these copies take
longer than the adapter's own products. Here the adapter is cast instead, which is a hundred times
smaller; its parameters and their gradients stay float32.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

_HALF = (torch.bfloat16, torch.float16)


class HalfLoraLinear(Linear):
    """PEFT's layer on half-precision weights; where inputs are as narrow, so are all products."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x W^T + alpha / r * x A^T B^T``."""
        if args or kwargs or not self._is_simple(x):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        (name,) = self.active_adapters
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        base_layer: Any = self.base_layer
        inputs = x.flatten(0, -2)
        inner = linear(self.lora_dropout[name](inputs), down.weight.to(x.dtype))
        result: Tensor = base_layer(inputs)
        # in place: the sum needs no pass of its own over the result
        result.addmm_(inner, up.weight.to(x.dtype).t(), alpha=self.scaling[name])
        return result.view(*x.shape[:-1], -1)

    def _is_simple(self, x: Tensor) -> bool:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        # the base's weights are not asked: a strategy that keeps them in parts would fetch them
        return x.dtype in _HALF


def spare_casts(model: nn.Module) -> None:
    """Let PEFT's plain LoRA layers with half-precision weights multiply in that precision."""
    for module in model.modules():
        # by exact type: quantised layers are linear layers too, and multiply in ways of their own
        if type(module) is not Linear or type(module.base_layer) is not nn.Linear:
            continue
        if module.base_layer.weight.dtype in _HALF and not module.lora_variant:
            module.__class__ = HalfLoraLinear
