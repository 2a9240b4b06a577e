"""The baselines `local` (nobody averages) and `central` (one client has everything)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedsafe.data.packing import pack
from fedsafe.federated.client_drift import FedProx
from fedsafe.federated.local_training import train_client
from fedsafe.federated.partition import IID, Natural
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.server_optimizer import FedAdam
from fedsafe.model.module import LoraLM

FederationMaker = Callable[..., Any]


def test_local_clients_go_on_alone(federation: FederationMaker) -> None:
    run = federation(rounds={"mode": "local", "clients_per_round": 4}).fit()
    own = run.rounds.server.own_adapters
    assert sorted(own) == [0, 1, 2, 3]
    assert torch.equal(run.adapter, run.start), "nothing is averaged"
    for client, adapter in own.items():
        expected = run.start
        for round_ in range(2):
            visit = run.rounds._schedule.plan(round_).visits[client]
            batches = run.data.client_dataloader(visit)
            expected = train_client(run.module, batches, start=expected).adapter
        assert torch.equal(adapter, expected)
        assert not any(torch.equal(adapter, own[k]) for k in own if k != client)


def test_local_clients_are_saved_and_validated_each_on_its_own_adapter(
    federation: FederationMaker, tiny_gpt2: Path
) -> None:
    run = federation(rounds={"mode": "local"}, data={"validation_share": 0.2}).fit()
    visits = run.rounds._schedule.plan(1).visits
    rows = [run.data.store[i] for i in run.data._validation]
    losses = []
    for visit in visits:
        run.module.flat_adapter().write(run.rounds.server.own_adapters[visit.client])
        nll = run.module.eval()(pack(rows))
        losses.append(nll.mean().item())
        name = run.data.partition.names[visit.client]
        folder = run.folder / "adapters" / f"{visit.client:04d}-{name}"
        base = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
        loaded = PeftModel.from_pretrained(base, folder).eval()
        ids = torch.tensor([[5, 6, 7]])
        run.module.peft_model.get_base_model().set_attn_implementation("sdpa")
        torch.testing.assert_close(
            loaded(ids).logits, run.module.peft_model(ids).logits, atol=1e-5, rtol=1e-5
        )
        run.module.peft_model.get_base_model().set_attn_implementation("fedsafe_packed")
    assert run.rows[1]["val/loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert not (run.folder / "adapter").exists()


def test_central_is_one_client_with_everything_and_as_many_steps(
    federation: FederationMaker,
) -> None:
    central = federation(rounds={"mode": "central"}, trainer={"max_epochs": 1}).fit()
    assert [c["client"] for c in central.rows[0]["clients"]] == ["everyone"]
    assert central.rows[0]["clients"][0]["weight"] == 26
    assert central.rows[0]["clients"][0]["steps"] == 6


def test_central_training_keeps_its_optimizer_over_rounds(federation: FederationMaker) -> None:
    run = federation(rounds={"mode": "central"}, trainer={"max_epochs": 3}).fit()
    adapter = run.start
    module = LoraLM(**run.module.hparams)
    module.configure_model()
    parameters = module.flat_adapter().parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    module.flat_adapter().write(adapter)
    for round_ in range(3):
        for key in run.rounds._schedule.plan(round_).batches():
            optimizer.zero_grad()
            nll = module(pack([run.data.store[i] for i in key.samples]))
            (nll.sum() / len(nll)).backward()
            optimizer.step()
    # the mean of one client is sum / weight, with a rounding of its own
    torch.testing.assert_close(run.adapter, module.flat_adapter().read(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["local", "central"])
@pytest.mark.parametrize(
    "settings",
    [{"server_optimizer": FedAdam()}, {"client_drift": FedProx()}],
    ids=["server_optimizer", "client_drift"],
)
def test_a_baseline_has_no_federated_server(mode: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"mode '{mode}' has no federated server"):
        FederatedRounds(mode=mode, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["local", "central"])
def test_no_adapter_travels_in_a_baseline(federation: FederationMaker, mode: str) -> None:
    run = federation(rounds={"mode": mode}).fit()
    assert [(row["bytes_up"], row["bytes_down"]) for row in run.rows] == [(0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("partition", "clients_per_round"), [(IID(2), 1), (IID(2), 2), (IID(13), 5), (Natural(), 4)]
)
def test_central_takes_the_steps_of_the_federation_under_local_epochs(
    federation: FederationMaker, partition: Any, clients_per_round: int
) -> None:
    settings = {"local_epochs": 2, "clients_per_round": clients_per_round}
    steps = {}
    for mode in ("federated", "central"):
        run = federation(
            mode,
            data={"partition": partition},
            rounds=settings | {"mode": mode},
            trainer={"max_epochs": 1},
        ).fit()
        steps[mode] = run.trainer.global_step
    assert steps["central"] == steps["federated"]


def test_central_takes_the_mean_where_clients_differ(federation: FederationMaker) -> None:
    rounds = {"mode": "central", "local_epochs": 1, "clients_per_round": 2}
    run = federation(rounds=rounds, trainer={"max_epochs": 1}).fit()
    assert run.trainer.global_step == 5  # of 4 clients with 3, 2, 3 and 2 steps, 2 a round


@pytest.mark.parametrize("mode", ["federated", "local", "central"])
def test_no_mode_has_more_clients_a_round_than_there_are(
    federation: FederationMaker, mode: str
) -> None:
    with pytest.raises(ValueError, match="clients_per_round is 99, but there are 4 clients; cho"):
        federation(rounds={"mode": mode, "clients_per_round": 99}).fit()
