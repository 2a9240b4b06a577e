"""A server that is killed and started again goes on as if it never had been."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import Federation
from lightning import Callback, Trainer
from memory_post import MemoryPost, Node

from fedsafe.data.augmentation import CaiAugmentation
from fedsafe.federated.checkpoint import RoundCheckpoint, last_checkpoint
from fedsafe.federated.client_drift import Scaffold
from fedsafe.federated.constitutional_training import ConstitutionalTraining
from fedsafe.federated.remote.facts import VISIT
from fedsafe.federated.remote.letter import Letter
from fedsafe.federated.server_listener import ServerVisitListener
from fedsafe.federated.server_optimizer import FedAdam

FederationMaker = Callable[..., Federation]
ServerMaker = Callable[..., Federation]
NodesMaker = Callable[..., dict[int, Node]]

NUM_ROUNDS = 3
WORDS = ("red", "blue", "green", "cat", "dog", "sun", "moon")


def settings_of(folder: Path, regime: str = "cheap") -> dict[str, Any]:
    """Everything that could be forgotten: control variates, moments, the server's own training."""
    rows = {
        "pairs": [{"prompt": f"{a}", "chosen": f"no {a}", "rejected": f"the {a}"} for a in WORDS],
        "helpful": [{"prompt": f"say {a}", "chosen": a, "rejected": "no"} for a in WORDS],
        "prompts": [{"prompt": f"how to {a}"} for a in WORDS],
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    paths = {name: str(folder / f"{name}.jsonl") for name in rows}
    if regime != "adaptive":
        del paths["prompts"]  # only the adaptive regime asks any beside ready pairs
    rates = {"sft_learning_rate": 1e-2, "dpo_learning_rate": 1e-3}
    asked = {"num_probe": 4} if regime == "adaptive" else {}
    return {
        "model": {"lora_dropout": 0.2, "lr_schedule": "cosine"},
        "data": {"cai": CaiAugmentation(**paths, helpful_share=0.25, batch_size=4)},
        "rounds": {
            "cai": ConstitutionalTraining(regime=regime, iterations=4, **rates, **asked),
            "client_drift": Scaffold(),
            "server_optimizer": FedAdam(0.1),
        },
        "trainer": {"max_epochs": NUM_ROUNDS},
    }


def node_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "trainer"}


class ServerKill(Callback, ServerVisitListener):
    """Ends the server in the middle of a visit of its own."""

    def __init__(self, round_: int) -> None:
        self.round = round_

    def on_server_step(self, trainer: Trainer, num_done: int) -> None:
        if trainer.current_epoch == self.round and num_done == 2:
            raise InterruptedError("killed")


def kill_at(post: MemoryPost, round_: int, node: int | None = None) -> None:
    """End the server as it sends an order of a round, to a node or to any."""

    def strike(to: int, letter: Letter) -> None:
        if letter.facts["kind"] != VISIT or letter.facts["round"] != round_:
            return
        if node in (None, to):
            raise InterruptedError("killed")

    post.on_send = strike


@pytest.mark.parametrize("regime", ["cheap", "final", "adaptive"])
def test_the_servers_own_training_is_that_of_one_process(
    federation: FederationMaker,
    nodes: NodesMaker,
    server: ServerMaker,
    tmp_path: Path,
    regime: str,
) -> None:
    settings = settings_of(tmp_path, regime)
    here = federation("here", **deepcopy(settings)).fit()
    post = MemoryPost(nodes(**node_settings(deepcopy(settings))))
    there = server(post, **settings).fit()
    assert torch.equal(there.adapter, here.adapter)
    assert there.rows == here.rows
    assert any("cai" in row for row in there.rows)


@pytest.fixture
def training(nodes: NodesMaker, server: ServerMaker, tmp_path: Path) -> Callable[..., Federation]:
    """Make the same server again and again, with nodes that remember nothing."""
    settings = settings_of(tmp_path)
    members = nodes(**node_settings(deepcopy(settings)))

    def make(
        name: str,
        *others: Callback,
        post: MemoryPost | None = None,
        fleet: dict[str, Any] | None = None,
    ) -> Federation:
        callbacks = (RoundCheckpoint(every_n_steps=1), *others)
        given = post if post is not None else MemoryPost(members)
        return server(given, name, callbacks=callbacks, fleet=fleet, **deepcopy(settings))

    make.members = members  # type: ignore[attr-defined]
    return make


def test_a_server_killed_anywhere_and_resumed_is_the_server_that_never_was(
    training: Any,
) -> None:
    whole = training("whole").fit()

    def assert_goes_on(name: str, killed: Federation) -> None:
        with pytest.raises(InterruptedError, match="killed"):
            killed.fit()
        last = last_checkpoint(killed.folder)
        again = training(name).fit(ckpt_path=last if last.exists() else None)
        assert torch.equal(again.adapter, whole.adapter), name
        assert again.rows == whole.rows, name

    for round_ in range(NUM_ROUNDS):
        clients = [client["client"] for client in whole.rows[round_]["clients"]]
        last = 11 + ["ada", "bob", "cyd", "dee"].index(clients[-1])
        post = MemoryPost(training.members)
        kill_at(post, round_, last)
        assert_goes_on(f"orders {round_}", training(f"orders {round_}", post=post))
        name = f"server visit {round_}"
        assert_goes_on(name, training(name, ServerKill(round_)))


def test_numbers_stay_when_others_are_there_than_before(training: Any) -> None:
    """Sorted anew, those that are left would get other numbers, and other random draws."""
    members = training.members
    first = MemoryPost({n: members[n] for n in (12, 13)})
    kill_at(first, 1)
    with pytest.raises(InterruptedError):
        training("run", post=first).fit()
    kept = json.loads((Path(training("run").folder) / "roster.json").read_text())
    assert [each["name"] for each in kept["clients"]] == ["bob", "cyd"]

    second = MemoryPost({n: members[n] for n in (11, 13, 14)})
    run = training("run", post=second, fleet={"grace_seconds": 0.1})
    run.fit(ckpt_path=last_checkpoint(run.folder))
    after = json.loads((run.folder / "roster.json").read_text())
    assert after["run"] == kept["run"]
    assert [each["name"] for each in after["clients"]] == ["bob", "cyd", "ada", "dee"]
    orders = [sent.facts for _, sent in second.sent if sent.facts["kind"] == VISIT]
    assert {(each["name"], each["client"]) for each in orders} <= {
        ("cyd", 1),
        ("ada", 2),
        ("dee", 3),
    }


def test_a_finished_run_waits_for_nobody(training: Any) -> None:
    whole = training("run").fit()
    again = training("run", post=MemoryPost({}))
    again.fit(ckpt_path=last_checkpoint(whole.folder))
    assert again.rows == whole.rows


@pytest.mark.parametrize("text", [None, "{", '{"run": "r"}', '{"run": "r", "clients": [{}]}'])
def test_a_roster_that_is_gone_or_spoiled_is_told(training: Any, text: str | None) -> None:
    post = MemoryPost(training.members)
    kill_at(post, 1)
    run = training("run", post=post)
    with pytest.raises(InterruptedError):
        run.fit()
    file = run.folder / "roster.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=r"roster.json.* cannot be read .*; restore it, or"):
        training("run").fit(ckpt_path=last_checkpoint(run.folder))


def test_another_run_keeps_its_roster(training: Any) -> None:
    folder = training("run").fit().folder
    before = (folder / "roster.json").read_bytes()
    with pytest.raises(ValueError, match="holds another run"):
        training("run").fit()
    assert (folder / "roster.json").read_bytes() == before


def test_values_travel_as_before_and_the_rest_of_the_fleet_may_change(training: Any) -> None:
    post = MemoryPost(training.members)
    kill_at(post, 1)
    with pytest.raises(InterruptedError):
        training("run", post=post).fit()
    last = last_checkpoint(training("run").folder)
    with pytest.raises(ValueError, match=r"fleet\.encoding was 'float32' and is 'bfloat16'"):
        training("run", fleet={"encoding": "bfloat16"}).fit(ckpt_path=last)
    changed = {"min_clients": 2, "deadline_seconds": 60.0, "target_clients": 2}
    assert len(training("run", fleet=changed).fit(ckpt_path=last).rows) == NUM_ROUNDS
