"""`ShardedStrategy`: the ranks of a group hold one model together and train one client (FSDP2)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from fedsafe.federated.exchange import ExchangeMode
from fedsafe.model.flat_adapter import FlatAdapter
from fedsafe.model.sharded_adapter import ShardedAdapter
from fedsafe.model.sharded_load import build_sharded
from fedsafe.peers import Peers
from fedsafe.strategies.layout import LaidOut, Layout
from fedsafe.strategies.one_file import OneFileCheckpoints

T = TypeVar("T")

_CLIENTS, _SHARDS = "clients", "shards"


class ShardedStrategy(LaidOut, OneFileCheckpoints, ModelParallelStrategy):
    """Splits the base and the adapter over ranks, with PyTorch's FSDP2.

    For a base too large for one GPU. With several `clients`, the ranks form as many groups, each of
    which holds the whole model together and trains clients of its own.

    Args:
        clients: Clients that are trained at once; a number that divides the number of ranks.
        exchange: What groups tell each other at a round's end: weighted `sums`, whose memory does
            not grow with the clients, or every client's update in turn, which is bit-equal to one
            group. Without use where there is one group.
        timeout: How long a rank waits for the others, such as 0:30:00, before the run ends: longer
            than the slowest loads the base, or the first to end a round waits for the last.
        process_group_backend: How ranks speak; None takes nccl on GPUs and gloo on CPUs.
    """

    def __init__(
        self,
        clients: int = 1,
        exchange: ExchangeMode = "sums",
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if clients < 1:
            raise ValueError(f"clients is {clients}; give the number to train at once, 1 or more")
        self.clients = clients
        self.exchange: ExchangeMode = exchange

    def take_groups(self, other: "ShardedStrategy") -> None:
        """Use the groups that another strategy of this process has formed, as its model does."""
        self._device_mesh = other.device_mesh

    def setup_environment(self) -> None:
        """Join the other ranks and form the groups, unless there are some.

        Raises:
            ValueError: If the number of ranks is not a multiple of `clients`.
        """
        num_ranks = self.num_nodes * self.num_processes
        if num_ranks % self.clients:
            raise ValueError(
                f"{num_ranks} ranks cannot form {self.clients} groups of one size; start a "
                f"multiple of {self.clients} ranks, or set the strategy's clients to a divisor of "
                f"{num_ranks}"
            )
        self._setup_distributed()
        if self._device_mesh is None:
            self._device_mesh = self._formed()
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def _formed(self) -> DeviceMesh:
        num_ranks = self.num_nodes * self.num_processes
        ranks = torch.arange(num_ranks).view(self.clients, -1)
        return DeviceMesh.from_group(
            [self._joined(ranks.t()), self._joined(ranks)],
            self.root_device.type,
            mesh=ranks,
            mesh_dim_names=(_CLIENTS, _SHARDS),
        )

    def _joined(self, groups: Tensor) -> dist.ProcessGroup:
        """Form groups, a row each; returns the one that this rank is in."""
        # a mesh that forms its own gives them torch's time-out, in which no large base is loaded
        own: dist.ProcessGroup
        own, _ = dist.new_subgroups_by_enumeration(groups.tolist(), timeout=self._timeout)
        return own

    @property
    def layout(self) -> Layout:
        """A group trains a client and holds a replica."""
        counterparts, group = self._peers(_CLIENTS), self._peers(_SHARDS)
        world = Peers(self.global_rank, self.world_size)
        return Layout(clients=counterparts, data=group, replicas=counterparts, world=world)

    def _peers(self, dimension: str) -> Peers:
        mesh = self.device_mesh[dimension]
        return Peers(mesh.get_local_rank(), mesh.size(), mesh.get_group())

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Whose turn it is where Lightning itself deals samples to ranks."""
        replicas = self.layout.replicas
        return {"num_replicas": replicas.size, "rank": replicas.index}

    # ---- the model -------------------------------------------------------------------------------

    def build(self, make: Callable[[], PeftModel]) -> PeftModel:
        """The model in parts; the first rank of each group makes it.

        Raises:
            ValueError: If its weights have 4 bits, which FSDP2 cannot split.
        """
        assert self.lightning_module is not None
        if self.lightning_module.hparams.get("quantize_4bit"):
            raise ValueError(
                "quantize_4bit packs weights in a form that cannot be split over ranks; leave it "
                "out, or take configs/strategy/ddp.yaml, whose ranks hold the whole base"
            )
        return build_sharded(make, self.device_mesh[_SHARDS], device=self.root_device)

    def call_inside(self, base: nn.Module, function: Callable[[], T]) -> T:
        """Call a function as FSDP2 calls a forward pass of the base, with its own weights whole."""
        call: Any = base.call_inside
        output: T = call(function)
        return output

    def flat_adapter(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> FlatAdapter:
        """Access to the adapter in parts."""
        return ShardedAdapter(named_parameters)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Let optimizers take all tensors at once: one by one, DTensors cost ten times as long."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["foreach"] = True

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients to oneself, as DDP does, until the last of the batches of a step."""
        assert self.model is not None
        root = next(each for each in self.model.modules() if isinstance(each, FSDPModule))
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)
