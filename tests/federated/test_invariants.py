"""Federations through the Trainer against plain PyTorch written here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from fedsafe.federated.client_drift import FedProx, Scaffold
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.schedule import RoundPlan, Schedule, Visit
from fedsafe.federated.server_optimizer import FedAvgM
from fedsafe.model.module import LoraLM

FederationMaker = Callable[..., Any]
SGD = {"optimizer": "sgd", "learning_rate": 0.5}


class PlainFederation:
    """FedAvg and its kin as one would write them in an afternoon.

    It takes from the run under test the schedule of samples and the tokens, and nothing else: the
    model, its loss over padded rows, the optimizers and the averages are its own.
    """

    def __init__(self, run: Any, base: Path) -> None:
        self.store, self.schedule = run.data.store, run.data.schedule
        partition = run.data.partition
        self.sizes = {k: len(partition.samples_of(k)) for k in range(len(partition))}
        model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")
        torch.manual_seed(0)
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            fan_in_fan_out="gpt2" in base.name,
        )
        self.model = get_peft_model(model, lora)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def vector(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def load(self, vector: Tensor) -> None:
        torch.nn.utils.vector_to_parameters(vector.clone(), self.parameters)

    def loss(self, samples: np.ndarray) -> Tensor:
        """Mean over the answer tokens of a padded batch."""
        rows = [self.store[i] for i in samples.tolist()]
        ids = torch.zeros(len(rows), max(len(tokens) for tokens, _ in rows), dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (tokens, answers) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, : len(tokens)][torch.tensor(answers)] = torch.tensor(tokens[answers]).long()
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def gradient(self, samples: np.ndarray) -> Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(self.loss(samples), self.parameters)]
        )

    def visits(self, round_: int) -> list[tuple[int, list[np.ndarray]]]:
        """The clients of a round, each with the samples of its steps."""
        keys = list(self.schedule.plan(round_).batches())
        clients = dict.fromkeys(key.client for key in keys)
        return [(k, [key.samples for key in keys if key.client == k]) for k in clients]

    def fedavg(self, num_rounds: int) -> Tensor:
        """AdamW at the clients, their samples as weights (McMahan et al. 2017, Algorithm 1)."""
        x = self.vector()
        for round_ in range(num_rounds):
            total, weight = torch.zeros_like(x, dtype=torch.float64), 0
            for client, steps in self.visits(round_):
                self.load(x)
                optimizer = torch.optim.AdamW(self.parameters, lr=1e-2, weight_decay=0.0)
                for samples in steps:
                    optimizer.zero_grad()
                    self.loss(samples).backward()
                    optimizer.step()
                total.add_(self.vector(), alpha=self.sizes[client])
                weight += self.sizes[client]
            x = (total / weight).float()
        return x

    def scaffold(self, num_rounds: int, lr: float) -> Tensor:
        """Karimireddy et al. (2020), Algorithm 1, option II; global step size 1."""
        x = self.vector()
        c, controls = torch.zeros_like(x), {k: torch.zeros_like(x) for k in self.sizes}
        for round_ in range(num_rounds):
            changes, control_changes = [], []
            for client, steps in self.visits(round_):
                y = x
                for samples in steps:
                    self.load(y)
                    y = y - lr * (self.gradient(samples) - controls[client] + c)
                new = controls[client] - c + (x - y) / (len(steps) * lr)
                changes.append(y - x)
                control_changes.append(new - controls[client])
                controls[client] = new
            x = x + torch.stack(changes).mean(0)
            c = c + torch.stack(control_changes).sum(0) / len(self.sizes)
        return x

    def fedprox(self, num_rounds: int, lr: float, mu: float) -> Tensor:
        """Li et al. (2020): the proximal term in the loss, through autograd; uniform weights."""
        x = self.vector()
        for round_ in range(num_rounds):
            ends = []
            for _, steps in self.visits(round_):
                self.load(x)
                optimizer = torch.optim.SGD(self.parameters, lr=lr)
                for samples in steps:
                    w = torch.cat([p.flatten() for p in self.parameters])
                    optimizer.zero_grad()
                    (self.loss(samples) + mu / 2 * (w - x).square().sum()).backward()
                    optimizer.step()
                ends.append(self.vector())
            x = torch.stack(ends).mean(0)
        return x


class PackedPlainFederation(PlainFederation):
    """The same loops over the packed forward pass: no rounding is left to differ."""

    def __init__(self, run: Any, base: Path) -> None:
        super().__init__(run, base)
        self.packed = LoraLM(str(base), rank=4, alpha=8.0)
        self.packed.configure_model()
        self.parameters = [p for p in self.packed.parameters() if p.requires_grad]

    def loss(self, samples: np.ndarray) -> Tensor:
        from fedsafe.data.packing import pack

        nll = self.packed(pack([self.store[i] for i in samples.tolist()]))
        return nll.sum() / len(nll)


@pytest.fixture(params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, tiny_gpt2: Path, tiny_llama: Path) -> Path:
    return {"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]


@pytest.mark.oracle
@pytest.mark.parametrize("local", [{"local_steps": 3}, {"local_epochs": 2}], ids=str)
def test_fedavg_is_the_plain_loop_bit_for_bit(
    federation: FederationMaker, base: Path, local: dict[str, int]
) -> None:
    run = federation(base=base, rounds=local, trainer={"max_epochs": 3}).fit()
    reference = PackedPlainFederation(run, base)
    start = reference.vector()
    expected = reference.fedavg(num_rounds=3)
    assert torch.equal(run.adapter, expected)
    assert torch.equal(run.module.flat_adapter().read(), expected)
    assert (expected - start).norm() > 0.5


@pytest.mark.oracle
def test_fedavg_is_plain_transformers_and_peft_on_padded_batches(
    federation: FederationMaker, base: Path
) -> None:
    run = federation(base=base).fit()
    reference = PlainFederation(run, base)
    expected = reference.fedavg(num_rounds=2)
    # Adam's first steps divide tiny gradients by their own size, hence some room for rounding
    assert (run.adapter - expected).norm() / expected.norm() < 1e-4


@pytest.mark.oracle
def test_one_full_batch_step_of_every_client_is_one_centralised_step(
    federation: FederationMaker, base: Path
) -> None:
    run = federation(
        base=base,
        model=SGD,
        data={"batch_size": 100},
        rounds={"clients_per_round": 4, "local_epochs": 1, "weighting": "tokens"},
        trainer={"max_epochs": 1},
    ).fit()
    reference = PlainFederation(run, base)
    start, everything = reference.vector(), np.arange(sum(reference.sizes.values()))
    expected = start - 0.5 * reference.gradient(everything)
    torch.testing.assert_close(run.adapter, expected, atol=1e-6, rtol=0)
    assert (expected - start).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_scaffold_without_control_variates_is_fedavg(
    federation: FederationMaker, optimizer: str
) -> None:
    model = {"optimizer": optimizer}
    one_round = {"max_epochs": 1}
    plain = federation("plain", model=model, trainer=one_round).fit()
    scaffold = federation(
        "scaffold", model=model, rounds={"client_drift": Scaffold()}, trainer=one_round
    ).fit()
    assert torch.equal(scaffold.adapter, plain.adapter)
    two = federation("two", model=model, rounds={"client_drift": Scaffold()}).fit()
    two_plain = federation("two-plain", model=model).fit()
    assert not torch.equal(two.adapter, two_plain.adapter), "control variates never act"


def test_fedprox_without_pull_is_fedavg(federation: FederationMaker) -> None:
    plain = federation("plain").fit()
    assert torch.equal(
        federation("zero", rounds={"client_drift": FedProx(mu=0.0)}).fit().adapter, plain.adapter
    )
    pulled = federation("pulled", rounds={"client_drift": FedProx(mu=0.5)}).fit()
    assert not torch.allclose(pulled.adapter, plain.adapter, atol=1e-4)


def test_fedavgm_without_momentum_is_fedavg(federation: FederationMaker) -> None:
    plain = federation("plain").fit()
    still = federation("still", rounds={"server_optimizer": FedAvgM(momentum=0.0)}).fit()
    torch.testing.assert_close(still.adapter, plain.adapter, atol=3e-6, rtol=0)
    moving = federation("moving", rounds={"server_optimizer": FedAvgM(momentum=0.9)}).fit()
    assert not torch.allclose(moving.adapter, plain.adapter, atol=1e-3)


@pytest.mark.oracle
def test_scaffold_follows_the_papers_algorithm(federation: FederationMaker, base: Path) -> None:
    run = federation(
        base=base,
        model=SGD,
        rounds={"client_drift": Scaffold(), "weighting": "uniform", "clients_per_round": 3},
        trainer={"max_epochs": 3},
    ).fit()
    expected = PlainFederation(run, base).scaffold(num_rounds=3, lr=0.5)
    torch.testing.assert_close(run.adapter, expected, atol=1e-5, rtol=0)


@pytest.mark.oracle
def test_fedprox_follows_the_gradient_of_the_proximal_loss(
    federation: FederationMaker, base: Path
) -> None:
    run = federation(
        base=base,
        model=SGD,
        rounds={"client_drift": FedProx(mu=0.7), "weighting": "uniform"},
    ).fit()
    expected = PlainFederation(run, base).fedprox(num_rounds=2, lr=0.5, mu=0.7)
    torch.testing.assert_close(run.adapter, expected, atol=1e-5, rtol=0)


def reverse_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Visit the clients of every round in descending order."""
    plan = Schedule.plan

    def reversed_plan(self: Schedule, round_: int) -> RoundPlan:
        visits = plan(self, round_).visits[::-1]
        renumbered = [Visit(*v)._replace(number=i) for i, v in enumerate(visits)]
        return RoundPlan(self, round_, renumbered)

    monkeypatch.setattr(Schedule, "plan", reversed_plan)


@pytest.mark.parametrize("drift", [None, Scaffold()], ids=["plain", "scaffold"])
def test_the_order_of_visits_does_not_matter(
    federation: FederationMaker, monkeypatch: pytest.MonkeyPatch, drift: Scaffold | None
) -> None:
    settings = {
        "model": {"lora_dropout": 0.2, **SGD},
        "rounds": {"clients_per_round": 3, "client_drift": drift},
    }
    forwards = federation("forwards", **settings).fit()
    reverse_visits(monkeypatch)
    backwards = federation("backwards", **settings).fit()
    names = [[c["client"] for c in run.rows[0]["clients"]] for run in (forwards, backwards)]
    assert names[0] == names[1][::-1]
    torch.testing.assert_close(backwards.adapter, forwards.adapter, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("data", "trainer"),
    [
        ({"num_workers": 2}, {}),
        ({}, {"logger": True, "log_every_n_steps": 1}),
        ({}, {"enable_progress_bar": True, "enable_model_summary": True}),
        ({"validation_share": 0.1}, {"num_sanity_val_steps": 0}),
    ],
    ids=["workers", "logging", "progress", "without sanity check"],
)
def test_how_a_run_is_watched_does_not_change_it(
    federation: FederationMaker, data: dict[str, Any], trainer: dict[str, Any]
) -> None:
    model = {"lora_dropout": 0.2}
    share = {"validation_share": data.get("validation_share", 0.0)}
    quiet = federation("quiet", model=model, data=share).fit()
    watched = federation("watched", model=model, data=data, trainer=trainer).fit()
    assert torch.equal(watched.adapter, quiet.adapter)
    assert watched.rows == quiet.rows


def test_dropout_is_at_work_in_these_tests(federation: FederationMaker) -> None:
    plain = federation("plain").fit()
    dropped = federation("dropped", model={"lora_dropout": 0.2}).fit()
    assert not torch.allclose(plain.adapter, dropped.adapter, atol=1e-3)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_gradient_accumulation_changes_nothing(federation: FederationMaker, parts: int) -> None:
    settings = {"model": SGD, "rounds": {"local_epochs": 2}}
    whole = federation("whole", **settings).fit()
    split = federation("split", **settings, trainer={"accumulate_grad_batches": parts}).fit()
    torch.testing.assert_close(split.adapter, whole.adapter, atol=1e-6, rtol=0)
    for row, expected in zip(split.rows, whole.rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert [c["steps"] for c in row["clients"]] == [c["steps"] for c in expected["clients"]]


@pytest.mark.parametrize("drift", [Scaffold(), FedProx(mu=0.5)], ids=lambda d: type(d).__name__)
def test_gradient_accumulation_and_drift_corrections_agree(
    federation: FederationMaker, drift: Scaffold | FedProx
) -> None:
    settings = {"model": SGD, "rounds": {"client_drift": drift}}
    whole = federation("whole", **settings).fit()
    split = federation("split", **settings, trainer={"accumulate_grad_batches": 2}).fit()
    torch.testing.assert_close(split.adapter, whole.adapter, atol=1e-6, rtol=0)


def test_gradient_checkpointing_changes_nothing(federation: FederationMaker, base: Path) -> None:
    plain = federation("plain", base=base, model={"lora_dropout": 0.2}).fit()
    saving = federation(
        "saving", base=base, model={"lora_dropout": 0.2, "gradient_checkpointing": True}
    ).fit()
    torch.testing.assert_close(saving.adapter, plain.adapter, atol=1e-6, rtol=1e-5)


def test_a_second_fit_of_the_same_objects_starts_afresh(federation: FederationMaker) -> None:
    drift, momentum = Scaffold(), FedAvgM(momentum=0.9)
    rounds = {"client_drift": drift, "server_optimizer": momentum}
    first = federation("first", rounds=rounds).fit()
    second = federation("second", rounds=rounds).fit()
    assert torch.equal(first.adapter, second.adapter)
    assert isinstance(second.rounds, FederatedRounds)
