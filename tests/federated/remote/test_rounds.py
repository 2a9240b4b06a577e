"""A federation over letters is the federation in one process."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import Federation
from memory_post import MemoryPost, Node
from word_guard import WordGuard

from fedsafe.federated.client_drift import FedProx, Scaffold
from fedsafe.federated.server_optimizer import FedAdam
from fedsafe.page.records import read_run
from fedsafe.safety.filter import SafetyFilter

FederationMaker = Callable[..., Federation]
ServerMaker = Callable[..., Federation]
NodesMaker = Callable[..., dict[int, Node]]

pytestmark = pytest.mark.usefixtures("own_cache")

SETTINGS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "weights are tokens": {"rounds": {"weighting": "tokens"}},
    "weights are one": {"rounds": {"weighting": "uniform"}},
    "fedadam": {"rounds": {"server_optimizer": FedAdam(0.1)}},
    "scaffold": {"rounds": {"client_drift": Scaffold()}},
    "fedprox": {"rounds": {"client_drift": FedProx(0.1)}},
    "epochs": {"rounds": {"local_epochs": 2}},
    "a share of clients": {"rounds": {"clients_per_round": 0.75}},
    "dropout and schedules": {
        "model": {"lora_dropout": 0.2, "warmup_steps": 2, "lr_schedule": "cosine"}
    },
}
FILTERED = {"data": {"filter": SafetyFilter(WordGuard("red"), "drop", max_unsafe_share=1.0)}}


def federate(
    nodes: NodesMaker, server: ServerMaker, settings: dict[str, Any], **others: Any
) -> Federation:
    """Run the federation of some settings over letters."""
    post = MemoryPost(nodes(**deepcopy(settings)))
    settings = deepcopy(settings)
    settings.get("data", {}).pop("filter", None)
    return server(post, **settings, **others).fit()


@pytest.mark.parametrize("name", SETTINGS)
def test_adapter_and_record_are_those_of_one_process(
    federation: FederationMaker, nodes: NodesMaker, server: ServerMaker, name: str
) -> None:
    here = federation("here", **deepcopy(SETTINGS[name])).fit()
    there = federate(nodes, server, SETTINGS[name])
    assert torch.equal(there.adapter, here.adapter)
    assert there.rows == here.rows
    files = [run.folder / "adapter" / "adapter_model.safetensors" for run in (here, there)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_clients_that_fail_by_chance_are_the_same_and_are_sent_nothing(
    federation: FederationMaker, nodes: NodesMaker, server: ServerMaker
) -> None:
    rounds = {"failure_probability": 0.4, "clients_per_round": 4, "seed": 2}
    here = federation("here", rounds=rounds).fit()
    there = federate(nodes, server, {"rounds": rounds})
    assert torch.equal(there.adapter, here.adapter)
    failed = [sum(c["status"] == "failed" for c in row["clients"]) for row in here.rows]
    assert sum(failed) > 0
    visit = 4 * there.adapter.numel()
    for ours, theirs, num_failed in zip(there.rows, here.rows, failed, strict=True):
        assert theirs.pop("bytes_down") - ours.pop("bytes_down") == num_failed * visit
        assert ours == theirs


def test_each_client_filters_its_own_samples(
    federation: FederationMaker, nodes: NodesMaker, server: ServerMaker
) -> None:
    here = federation("here", **deepcopy(FILTERED)).fit()
    there = federate(nodes, server, FILTERED)
    assert torch.equal(there.adapter, here.adapter)
    assert there.rows == here.rows
    ours, theirs = (read_run(run.folder).filtered for run in (there, here))
    assert ours is not None
    assert theirs is not None
    assert ours["clients"] == theirs["clients"]
    assert ours["total"] == theirs["total"]
    assert ours["threshold"] is None


def test_bfloat16_halves_the_bytes_and_errs_by_its_rounding(
    federation: FederationMaker, nodes: NodesMaker, server: ServerMaker
) -> None:
    # AdamW's first steps have the size of the learning rate, whichever sign rounding gives them
    settings = {"model": {"optimizer": "sgd", "learning_rate": 0.1}}
    here = federation("here", **settings).fit()
    there = federate(nodes, server, settings, fleet={"encoding": "bfloat16"})
    for ours, theirs in zip(there.rows, here.rows, strict=True):
        assert 2 * ours["bytes_up"] == theirs["bytes_up"]
        assert 2 * ours["bytes_down"] == theirs["bytes_down"]
    moved, off = (here.adapter - here.start).norm(), (there.adapter - here.adapter).norm()
    assert 0 < off < 2**-6 * moved  # a value is off by 2**-9 of itself at most, down and up


def test_each_round_records_the_loss_of_the_adapter_that_it_began_with(
    federation: FederationMaker, nodes: NodesMaker, server: ServerMaker, tmp_path: Path
) -> None:
    held_out = {"data": {"validation_share": 0.25}, "rounds": {"clients_per_round": 4}}
    there = federate(nodes, server, held_out)
    losses = [row["val/loss_start"] for row in there.rows]
    assert losses[1] < losses[0]
    assert there.trainer.callback_metrics["val/loss_start"].item() == pytest.approx(losses[1])
    assert "val/loss_start" not in federate(nodes, server, {}, name="without").rows[0]


def test_a_share_of_few_is_never_fewer_than_a_round_needs(
    honest_nodes: dict[int, Node], server: ServerMaker
) -> None:
    """Half of two would be one, and every round would end the run."""
    post = MemoryPost({number: honest_nodes[number] for number in (11, 12)})
    half = {"rounds": {"clients_per_round": 0.5}, "fleet": {"min_clients": 2}}
    for row in server(post, **half).fit().rows:
        assert [client["client"] for client in row["clients"]] == ["ada", "bob"]
