"""What a round does, records and refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedsafe.data.packing import pack
from fedsafe.federated.client_drift import FedProx, Scaffold
from fedsafe.federated.local_training import LocalTraining
from fedsafe.federated.server import Update

FederationMaker = Callable[..., Any]


def poison(monkeypatch: pytest.MonkeyPatch, *, visits: set[int], value: float) -> None:
    """Spoil one value of what some visits, counted over the run from 0, give back."""
    finish, count = LocalTraining.finish, iter(range(1000))

    def poisoned(self: LocalTraining) -> Update:
        update = finish(self)
        if next(count) in visits:
            update.adapter[3] = value
        return update

    monkeypatch.setattr(LocalTraining, "finish", poisoned)


# ---- who trains, and how much it counts ----------------------------------------------------------


@pytest.mark.parametrize("drift", [None, Scaffold], ids=["plain", "scaffold"])
def test_clients_trained_one_by_one_average_to_the_same_bit_for_bit(
    federation: FederationMaker, drift: type[Scaffold] | None
) -> None:
    rounds = {"client_drift": drift() if drift else None}
    model = {"lora_dropout": 0.2}
    run = federation(model=model, rounds=rounds, trainer={"max_epochs": 1}).fit()
    start, sizes = run.start, run.data.partition.sizes
    updates = run.train_alone(round_=0)
    total = torch.zeros_like(start, dtype=torch.float64)
    for client, update in updates.items():
        total.add_(update.adapter, alpha=float(sizes[client]))
    mean = total / sum(float(sizes[k]) for k in updates)
    assert torch.equal(run.adapter, mean.float())
    for record, update in zip(run.rows[0]["clients"], updates.values(), strict=True):
        assert record["loss"] == update.loss
        assert (record["steps"], record["tokens"]) == (update.num_steps, update.num_tokens)
        assert record["update_norm"] == pytest.approx((update.adapter - start).norm().item())


@pytest.mark.parametrize("weighting", ["samples", "tokens", "uniform"])
def test_weights_are_what_was_asked_for(federation: FederationMaker, weighting: str) -> None:
    run = federation(rounds={"weighting": weighting, "clients_per_round": 4}).fit()
    store, partition = run.data.store, run.data.partition
    tokens = {
        name: sum(int(store[i][1].sum()) for i in partition.samples_of(k))
        for k, name in enumerate(partition.names)
    }
    expected = {
        "samples": {"ada": 9, "bob": 4, "cyd": 7, "dee": 6},
        "tokens": tokens,
        "uniform": dict.fromkeys(tokens, 1),
    }
    for row in run.rows:
        assert {c["client"]: c["weight"] for c in row["clients"]} == expected[weighting]
        assert {c["client"]: c["samples"] for c in row["clients"]} == expected["samples"]


def test_uniform_weights_give_the_plain_mean(federation: FederationMaker) -> None:
    run = federation(rounds={"weighting": "uniform"}, trainer={"max_epochs": 1}).fit()
    updates = run.train_alone(round_=0).values()
    mean = torch.stack([update.adapter for update in updates]).mean(0)
    torch.testing.assert_close(run.adapter, mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"), [(1, 1), (3, 3), (0.5, 2), (0.01, 1), (1.0, 4), (0.74, 3)]
)
def test_clients_are_sampled_by_number_or_by_share(
    federation: FederationMaker, given: float, expected: int
) -> None:
    run = federation(rounds={"clients_per_round": given, "local_steps": 1}).fit()
    assert [len(row["clients"]) for row in run.rows] == [expected, expected]


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        (
            {"clients_per_round": 5},
            "clients_per_round is 5, but there are 4 clients; choose 1 to 4",
        ),
        ({"clients_per_round": 0}, "clients_per_round is 0, but there are 4 clients"),
        ({"clients_per_round": 2.5}, "clients_per_round is 2.5; give a whole number"),
        ({"clients_per_round": 0.0}, "clients_per_round is 0.0; give a whole number"),
        ({"clients_per_round": -0.5}, "clients_per_round is -0.5; give a whole number"),
        ({"local_epochs": 1, "local_steps": 1}, "give local_steps or local_epochs, not both"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    federation: FederationMaker, rounds: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        federation(rounds=rounds).fit()


# ---- failures ------------------------------------------------------------------------------------


def test_failing_clients_come_from_the_seed_and_are_recorded_by_name(
    federation: FederationMaker,
) -> None:
    rounds = {"failure_probability": 0.4, "clients_per_round": 4, "seed": 3}
    first = federation("first", rounds=rounds, trainer={"max_epochs": 3}).fit()
    again = federation("again", rounds=rounds, trainer={"max_epochs": 3}).fit()
    assert first.rows == again.rows
    other = federation("other", rounds=rounds | {"seed": 4}, trainer={"max_epochs": 3}).fit()
    failures = [
        [(r["round"], c["client"]) for r in run.rows for c in r["clients"] if c["status"] != "ok"]
        for run in (first, other)
    ]
    assert failures[0]
    assert failures[0] != failures[1]
    for row in first.rows:
        statuses = [c["status"] for c in row["clients"]]
        assert sorted(c["client"] for c in row["clients"]) == ["ada", "bob", "cyd", "dee"]
        size = first.adapter.numel() * 4
        assert row["bytes_down"] == 4 * size
        assert row["bytes_up"] == statuses.count("ok") * size


def test_a_failed_client_does_not_count_in_the_mean(federation: FederationMaker) -> None:
    rounds = {"failure_probability": 0.4, "clients_per_round": 4, "seed": 3}
    run = federation(rounds=rounds, trainer={"max_epochs": 1}).fit()
    updates = run.train_alone(round_=0)
    assert 0 < len(updates) < 4
    total = sum(run.data.partition.sizes[k] * u.adapter for k, u in updates.items())
    mean = total / sum(run.data.partition.sizes[k] for k in updates)
    torch.testing.assert_close(run.adapter, mean, atol=1e-6, rtol=1e-5)


def test_a_round_without_a_client_left_is_an_error_that_names_them(
    federation: FederationMaker,
) -> None:
    run = federation(rounds={"failure_probability": 1.0})
    with pytest.raises(ValueError, match=r"round 1 fails \(\w{3}, \w{3}\).*; resume, or start"):
        run.fit()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("drift", [None, Scaffold()], ids=["plain", "scaffold"])
def test_a_poisoned_update_is_refused_recorded_and_left_out(
    federation: FederationMaker,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    drift: Scaffold | None,
) -> None:
    poison(monkeypatch, visits={1}, value=value)
    run = federation(rounds={"client_drift": drift}).fit()
    good, bad = run.rows[0]["clients"]
    assert (good["status"], bad["status"]) == ("ok", "refused")
    assert bad["client"] == "cyd"
    assert bad["reason"] == f"1 of {run.adapter.numel()} values are not finite"
    assert all(c["status"] == "ok" for c in run.rows[1]["clients"]), "the poison stayed"
    monkeypatch.undo()
    alone = federation("alone", rounds={"client_drift": drift}, trainer={"max_epochs": 1}).fit()
    survivor = alone.train_alone(round_=0)[1]
    assert run.rows[0]["update_norm"] == pytest.approx(good["update_norm"])
    assert run.rows[0]["adapter_norm"] == pytest.approx(survivor.adapter.norm().item(), rel=1e-5)


def test_a_round_in_which_every_update_is_refused_fails_loudly(
    federation: FederationMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, visits={0, 1}, value=math.nan)
    with pytest.raises(ValueError, match=r"no update to average \(bob: 1 of .*; cyd: 1 of .*\)"):
        federation().fit()


# ---- what is written -----------------------------------------------------------------------------


def test_a_row_measures_what_happened(federation: FederationMaker) -> None:
    run = federation(trainer={"max_epochs": 1}).fit()
    (row,) = run.rows
    start = run.start
    updates = run.train_alone(round_=0)
    change = run.adapter - start
    assert row["round"] == 1
    assert row["update_norm"] == pytest.approx(change.norm().item())
    assert row["adapter_norm"] == pytest.approx(run.adapter.norm().item())
    assert row["tokens"] == sum(u.num_tokens for u in updates.values())
    nats = sum(u.loss * u.num_tokens for u in updates.values())
    assert row["loss"] == pytest.approx(nats / row["tokens"])
    for record, update in zip(row["clients"], updates.values(), strict=True):
        own = update.adapter - start
        cosine = torch.nn.functional.cosine_similarity(own, change, dim=0)
        assert record["cosine_to_mean"] == pytest.approx(cosine.item(), abs=0.05)


@pytest.mark.parametrize(
    ("drift", "vectors"), [(None, 1), (FedProx(), 1), (Scaffold(), 2)], ids=["none", "prox", "sc"]
)
def test_bytes_count_every_vector_that_travels(
    federation: FederationMaker, drift: Any, vectors: int
) -> None:
    run = federation(rounds={"client_drift": drift}).fit()
    expected = 2 * vectors * run.adapter.numel() * 4
    assert [(r["bytes_up"], r["bytes_down"]) for r in run.rows] == [(expected, expected)] * 2


def test_rounds_that_are_not_validated_have_no_figures_of_earlier_ones(
    federation: FederationMaker,
) -> None:
    run = federation(
        data={"validation_share": 0.2}, trainer={"max_epochs": 5, "check_val_every_n_epoch": 2}
    ).fit()
    assert ["val/loss" in row for row in run.rows] == [False, True, False, True, False]
    assert run.rows[1]["val/loss"] != run.rows[3]["val/loss"]


def test_validation_sees_the_new_global_adapter(federation: FederationMaker) -> None:
    run = federation(data={"validation_share": 0.2}).fit()
    run.module.flat_adapter().write(run.adapter)
    nll = run.module.eval()(pack([run.data.store[i] for i in run.data._validation]))
    assert run.rows[1]["val/loss"] == pytest.approx(nll.mean().item(), rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_adapter_on_disk_gives_the_same_logits_under_peft(
    federation: FederationMaker, tiny_gpt2: Path, tiny_llama: Path, family: str
) -> None:
    folder = {"gpt2": tiny_gpt2, "llama": tiny_llama}[family]
    run = federation(base=folder).fit()
    ids = torch.tensor([[5, 60, 7, 9]])
    run.module.peft_model.get_base_model().set_attn_implementation("sdpa")
    expected = run.module.peft_model.eval()(ids).logits
    base = AutoModelForCausalLM.from_pretrained(folder)
    plain = base(ids).logits
    loaded = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_a_random_base_is_written_once_beside_its_adapter(
    federation: FederationMaker, tiny_gpt2: Path
) -> None:
    config = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 128, "n_positions": 256}
    run = federation(
        model={"base": "gpt2", "from_config": config}, data={"tokenizer": str(tiny_gpt2)}
    ).fit()
    named = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(run.folder / "base")
    ids = torch.tensor([[5, 60, 7, 9]])
    base = AutoModelForCausalLM.from_pretrained(run.folder / "base")
    loaded = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
    run.module.peft_model.get_base_model().set_attn_implementation("sdpa")
    expected = run.module.peft_model.eval()(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
