"""A model of which no rank ever holds more than its part, but for one, in host memory.

    the first rank of a group makes the model on the CPU
    its parameters are taken out; what is left, modules and buffers, is small and goes to all
    every rank splits the empty model with FSDP2, layer by layer
    parameter after parameter goes to the group; each rank keeps its rows, the first drops the whole

The others need no files of the base.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from fedsafe.peers import Peers

T = TypeVar("T")


def build_sharded(
    make: Callable[[], PeftModel], mesh: DeviceMesh, *, device: torch.device
) -> PeftModel:
    """Make a model on one rank, and split it over a group.

    Args:
        make: Makes the base with its adapter, whole and on the CPU.
        mesh: The group, of one dimension.
        device: Where this rank keeps its part.

    Raises:
        ValueError: On every rank, if `make` raised one.
    """
    model, values = receive_skeleton(
        make, Peers(mesh.get_local_rank(), mesh.size(), mesh.get_group())
    )
    split(model, mesh)
    _fill(model, values, device)
    return model


def receive_skeleton(
    make: Callable[[], PeftModel], peers: Peers
) -> tuple[PeftModel, dict[str, Tensor]]:
    """Make a model on the first of some ranks; all get it, its parameters on the meta device.

    Args:
        make: Makes the base with its adapter, whole and on the CPU.
        peers: The ranks.

    Returns:
        The model, and on the first rank the values of its parameters by name, elsewhere nothing.
        Parameters that are used in two places have one name, and are one parameter.

    Raises:
        ValueError: On every rank, if `make` raised one.
    """
    values: dict[str, Tensor] = {}

    def skeleton() -> bytes:
        model = make()
        values.update(_taken_out(model))
        return pickle.dumps(model)

    received: PeftModel = pickle.loads(peers.from_first(skeleton))
    return received, values


def split(model: PeftModel, mesh: DeviceMesh) -> None:
    """Let FSDP2 keep a model in parts: rows of every parameter, which come together layer by layer.

    Its units are the decoder layers, the embeddings, and the base with all else; embeddings that
    are the output layer too stay with the base, which is where the output layer is used.
    """
    base: Any = model.get_base_model()
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    units = [*decoder_layers(base)]
    if embeddings.weight is not head.weight:
        units.append(embeddings)
    for unit in [*units, base]:
        # the base too: else FSDP2 leaves its own part whole between two passes
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    base.call_inside = _call
    register_fsdp_forward_method(base, "call_inside")


def _call(function: Callable[[], T]) -> T:
    return function()


def decoder_layers(base: nn.Module) -> nn.ModuleList:
    """The list of modules that holds most of a model's parameters."""
    lists = [each for each in base.modules() if isinstance(each, nn.ModuleList)]
    assert lists, f"{type(base).__name__} has no list of layers"
    return max(lists, key=lambda each: sum(p.numel() for p in each.parameters()))


def _taken_out(model: nn.Module) -> dict[str, Tensor]:
    """Move the parameters out of a model, which keeps what they look like."""
    values = dict(model.named_parameters())
    empty = {
        parameter: nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in values.values()
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, empty[parameter])
    return {name: parameter.detach() for name, parameter in values.items()}


@torch.no_grad()
def _fill(model: PeftModel, values: dict[str, Tensor], device: torch.device) -> None:
    """Give a split model its values, which the first rank of the group has."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.to_empty(device=device)
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole = values.pop(name, None)
        if whole is None:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        parts = distribute_tensor(
            whole.to(device), parameter.device_mesh, parameter.placements, src_data_rank=0
        )
        parameter.to_local().copy_(parts.to_local())
