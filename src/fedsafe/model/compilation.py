"""`torch.compile` of the parts of each decoder layer.

What a compiler gains here are the many small operations between the products: norms, rotary
embeddings, activations. Attention within the samples of a pack stays as it is. Compiled are the
parts and not the whole layer, so that layers may be checkpointed; one compilation serves all layers
and any number of tokens.
"""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> None:
    """Have the parts of each layer compiled, in place, the first time they run.

    Args:
        model: A model of transformers, with or without an adapter.
        backend: Compiler, by its name in torch.

    Raises:
        ValueError: If the model has no layers of transformers' common kind.
    """
    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that can be compiled apart; "
            "set model.compile to false"
        )
    for layer in layers:
        for part in layer.children():
            part.compile(dynamic=True, backend=backend)
