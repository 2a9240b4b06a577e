import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from federations import build_federation
from lightning.pytorch.plugins.environments import LightningEnvironment
from thread_peers import together

from fedsafe.model.flat_adapter import WholeAdapter
from fedsafe.model.module import LoraLM
from fedsafe.peers import ALONE, Peers
from fedsafe.strategies.client_parallel import ClientParallelStrategy
from fedsafe.strategies.layout import Layout, exchange_of, layout_of


@pytest.fixture
def process_group() -> Iterator[None]:
    """Whatever a strategy starts is ended."""
    yield
    dist.destroy_process_group()


def test_each_rank_is_a_client_group_and_holds_a_replica() -> None:
    environment = LightningEnvironment()
    environment.set_world_size(3)
    environment.set_global_rank(2)
    strategy = ClientParallelStrategy("updates")
    strategy.cluster_environment = environment
    strategy.parallel_devices = [torch.device("cpu")]
    everyone = Peers(2, 3)
    assert layout_of(strategy) == Layout(
        clients=everyone, data=ALONE, replicas=everyone, world=everyone
    )
    assert exchange_of(strategy) == "updates"


def test_ranks_begin_with_the_adapter_of_the_first_and_each_with_its_own_base(
    tiny_gpt2: Path,
) -> None:
    modules = []
    for number in range(2):
        module = LoraLM(str(tiny_gpt2), rank=2)
        module.configure_model()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(number + 1)
        modules.append(module)

    class OnThreads(ClientParallelStrategy):
        peers = ALONE

        @property
        def layout(self) -> Layout:
            return Layout(world=self.peers)

    def set_up(peers: Peers) -> None:
        strategy = OnThreads()
        strategy.peers = peers
        assert strategy._setup_model(modules[peers.index]) is modules[peers.index]

    together(2, set_up)
    for number, module in enumerate(modules):
        assert (WholeAdapter(module.named_parameters()).read() == 1).all()
        assert all((p == number + 1).all() for p in module.parameters() if not p.requires_grad)


def test_one_rank_trains_as_without_a_strategy(
    tiny_gpt2: Path, tmp_path: Path, process_group: None
) -> None:
    path = tmp_path / "conversations.jsonl"
    rows = [{"prompt": "red", "response": "cat" * n, "client": f"c{n % 3}"} for n in range(1, 13)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [
        build_federation(
            tmp_path / name, base=tiny_gpt2, path=path, trainer={"strategy": strategy}
        ).fit()
        for name, strategy in (("plain", "auto"), ("clients", ClientParallelStrategy()))
    ]
    plain, alone = runs
    assert torch.equal(alone.adapter, plain.adapter)
    assert alone.rows == plain.rows
