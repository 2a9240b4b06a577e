"""A node trains, bit for bit, what the same client of a simulated federation trains."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from federations import CLIENT_SIZES, Federation
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from word_guard import WordGuard

from fedsafe.data.packing import pack
from fedsafe.federated.client_drift import Correction, FedProx, Scaffold
from fedsafe.federated.remote.client_trainer import ClientTrainer
from fedsafe.federated.remote.facts import (
    Failure,
    Greeting,
    NodeFacts,
    VisitOrder,
    VisitReport,
)
from fedsafe.federated.remote.letter import Letter
from fedsafe.federated.remote.own_data import OwnData
from fedsafe.federated.remote.tensors import pack_adapter, pack_tensors, unpack_adapter
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.server import Server, Update
from fedsafe.model.flat_adapter import FlatAdapter
from fedsafe.model.module import LoraLM
from fedsafe.safety.filter import SafetyFilter
from fedsafe.strategies.client_parallel import ClientParallelStrategy
from fedsafe.strategies.sharded import ShardedStrategy

FederationMaker = Callable[..., Federation]
NodeMaker = Callable[..., ClientTrainer]

pytestmark = pytest.mark.usefixtures("own_cache")

NAMES = list(CLIENT_SIZES)
MODEL = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-2}


@pytest.fixture
def node(tiny_gpt2: Path, conversations: Path) -> NodeMaker:
    """Make the node of one client of the tiny federation; settings as for the federation."""

    def make(name: str = "cyd", **settings: Any) -> ClientTrainer:
        model = {"base": str(tiny_gpt2), **MODEL, **settings.get("model", {})}
        data = {
            "path": str(conversations),
            "tokenizer": str(tiny_gpt2),
            "batch_size": 3,
            "validation_share": 0.0,
            **settings.get("data", {}),
        }
        rounds = settings.get("rounds", {})
        if "local_epochs" not in rounds:
            rounds = {"local_steps": 3, **rounds}
        return ClientTrainer(
            LoraLM(**model),
            OwnData(name, **data),
            FederatedRounds(**rounds),
            trainer_settings={"accelerator": "cpu", **settings.get("trainer", {})},
        )

    return make


@pytest.fixture
def adapter(tiny_gpt2: Path) -> FlatAdapter:
    """The names and shapes of the tiny model's adapter, and a fresh one's values."""
    module = LoraLM(base=str(tiny_gpt2), **MODEL)
    module.configure_model()
    return module.flat_adapter()


def order_for(name: str = "cyd", **facts: Any) -> VisitOrder:
    """An order to a client of the tiny federation."""
    known = {
        "run": "r",
        "ticket": "t",
        "round": 0,
        "num_rounds": 2,
        "client": NAMES.index(name) if name in NAMES else 0,
        "name": name,
        "number": 0,
        "encoding": "float32",
        "validate": False,
    }
    return VisitOrder(**{**known, **facts})


def letter_of(
    order: VisitOrder,
    adapter: FlatAdapter,
    start: Tensor,
    sent: Mapping[str, Tensor] | None = None,
) -> Letter:
    encoding: Any = order.encoding
    return order.letter(pack_adapter(adapter, start, sent or {}, encoding=encoding))


class Seen(NamedTuple):
    """One visit of a simulated federation: what the client was given, and what came of it."""

    start: Tensor
    sent: dict[str, Tensor]
    update: Update
    learnt: dict[str, Tensor]


def simulated_visits(
    monkeypatch: pytest.MonkeyPatch, federation: FederationMaker, **settings: Any
) -> dict[int, Seen]:
    """The visits of the second round of a run in one process, by client."""
    seen: dict[int, Seen] = {}
    sent: dict[int, dict[str, Tensor]] = {}
    correction_for, receive = Server.correction_for, Server.receive

    def spy_on_correction(server: Server, client: int) -> Correction | None:
        correction = correction_for(server, client)
        vectors = correction.sent() if correction is not None else {}
        sent[client] = {name: vector.clone() for name, vector in vectors.items()}
        return correction

    def spy_on_update(server: Server, client: int, update: Update, **rest: Any) -> None:
        correction = rest["correction"]
        learnt = correction.learnt() if correction is not None else {}
        seen[client] = Seen(server.start_of(client).clone(), sent[client], update, learnt)
        receive(server, client, update, **rest)

    monkeypatch.setattr(Server, "correction_for", spy_on_correction)
    monkeypatch.setattr(Server, "receive", spy_on_update)
    rounds = {"clients_per_round": 4, **settings.pop("rounds", {})}
    federation(rounds=rounds, **settings).fit()
    return seen


def filtered(policy: str, word: str = "red") -> dict[str, Any]:
    """Settings of the data, with a guard that finds a word."""
    return {"filter": SafetyFilter(WordGuard(word), policy=policy, max_unsafe_share=1.0)}


@pytest.mark.parametrize(
    "make_settings",
    [
        pytest.param(lambda: {}, id="fedavg"),
        pytest.param(lambda: {"rounds": {"client_drift": FedProx(mu=1.0)}}, id="fedprox"),
        pytest.param(lambda: {"rounds": {"client_drift": Scaffold()}}, id="scaffold"),
        pytest.param(lambda: {"rounds": {"local_epochs": 2}}, id="epochs"),
        pytest.param(lambda: {"data": filtered("drop")}, id="filter that drops"),
        pytest.param(lambda: {"data": filtered("refuse")}, id="filter that repairs"),
        pytest.param(
            lambda: {
                "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
                "model": {"lora_dropout": 0.2, "lr_schedule": "cosine", "warmup_steps": 2},
                "rounds": {"seed": 5},
            },
            id="parts, clipping, dropout, rates of the round, a seed",
        ),
        pytest.param(lambda: {"trainer": {"precision": "bf16-mixed"}}, id="bfloat16"),
    ],
)
def test_a_node_trains_what_the_simulated_client_trains(
    make_settings: Callable[[], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    federation: FederationMaker,
    node: NodeMaker,
    adapter: FlatAdapter,
) -> None:
    seen = simulated_visits(monkeypatch, federation, **make_settings())
    assert len(seen) >= 3  # the filter may leave a client nothing
    for client, visit in seen.items():
        name = NAMES[client]
        order = order_for(name, round=1, number=client)
        given = node(name, **make_settings()).answer(
            letter_of(order, adapter, visit.start, visit.sent)
        )
        report = VisitReport.read(given.facts)
        trained, learnt = unpack_adapter(
            adapter, given.tensors, list(visit.learnt), encoding="float32"
        )
        assert torch.equal(trained, visit.update.adapter)
        assert (report.loss, report.num_steps, report.num_tokens) == visit.update[1:]
        assert all(torch.equal(learnt[name], vector) for name, vector in visit.learnt.items())
        assert (report.run, report.ticket, report.round, report.client) == ("r", "t", 1, client)


def test_the_same_order_has_the_same_answer_whatever_came_between(
    node: NodeMaker, adapter: FlatAdapter
) -> None:
    trainer = node(rounds={"client_drift": Scaffold()})
    start = adapter.read()
    sent = {"shift": torch.full_like(start, 0.01)}
    letter = letter_of(order_for(), adapter, start, sent)
    first = trainer.answer(letter)
    trainer.answer(letter_of(order_for(round=1), adapter, start + 1, {"shift": start + 1}))
    trainer.answer(letter_of(order_for(), adapter, start * float("nan"), sent))
    trainer.answer(Letter({"kind": "nonsense"}))
    again = trainer.answer(letter)
    assert again.tensors == first.tensors
    assert {**again.facts, "seconds": 0} == {**first.facts, "seconds": 0}


def test_what_travels_in_bfloat16_comes_back_in_it(node: NodeMaker, adapter: FlatAdapter) -> None:
    trainer, start = node(), adapter.read() + 0.01
    given = trainer.answer(letter_of(order_for(encoding="bfloat16"), adapter, start))
    rounded = trainer.answer(letter_of(order_for(), adapter, start.bfloat16().float()))
    trained = unpack_adapter(adapter, given.tensors, [], encoding="bfloat16")[0]
    expected = unpack_adapter(adapter, rounded.tensors, [], encoding="float32")[0]
    change = expected - start.bfloat16().float()
    assert torch.equal(trained, change.bfloat16().float())


def test_a_greeting_is_answered_with_numbers(node: NodeMaker) -> None:
    trainer = node("ada", data={**filtered("drop", "sun"), "validation_share": 0.34})
    facts = NodeFacts.read(trainer.answer(Greeting("some-run").letter()).facts)
    assert (facts.run, facts.client) == ("some-run", "ada")
    held = CLIENT_SIZES["ada"] - 3  # a third is held out
    assert facts.filtered["judged"] == held
    assert facts.num_samples == facts.filtered["left"] == held - facts.filtered["unsafe"]
    assert facts.filtered["unsafe"] > 0
    assert facts.settings["model.rank"] == 4
    assert facts.versions.keys() >= {"fedsafe", "torch"}


def test_the_adapter_sent_is_measured_on_what_is_held_out(
    node: NodeMaker, adapter: FlatAdapter
) -> None:
    trainer = node("ada", data={"validation_share": 0.34}, model={"lora_dropout": 0.5})
    start = adapter.read() + 0.02
    report = VisitReport.read(
        trainer.answer(letter_of(order_for("ada", validate=True), adapter, start)).facts
    )
    module, data = trainer._module, trainer._data
    module.flat_adapter().write(start)
    module.eval()
    nll = module(pack([data.store[i] for i in data._validation.tolist()])).double().sum().item()
    tokens = int(data.store.answer_counts[data._validation].sum())
    assert len(data._validation) == 3
    assert report.start_tokens == tokens
    assert report.start_nll == pytest.approx(nll, rel=1e-6)


def test_measuring_changes_nothing_of_what_is_trained(
    node: NodeMaker, adapter: FlatAdapter
) -> None:
    trainer = node("ada", data={"validation_share": 0.34}, model={"lora_dropout": 0.5})
    asked = [order_for("ada", validate=validate) for validate in (True, False)]
    given = [trainer.answer(letter_of(each, adapter, adapter.read())) for each in asked]
    assert given[0].tensors == given[1].tensors
    assert given[0].facts["loss"] == given[1].facts["loss"]
    assert (given[1].facts["start_nll"], given[1].facts["start_tokens"]) == (0.0, 0)


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        pytest.param({"name": "bob"}, "an order for 'bob' came to 'cyd'", id="another client"),
        pytest.param({"client": -1}, "client is -1; expected 0 to", id="number below 0"),
        pytest.param({"client": 10**12}, "client is 1000000000000", id="number beyond use"),
        pytest.param({"round": 2}, "round is 2 of 2; rounds count from 0", id="no such round"),
        pytest.param({"encoding": "int8"}, "encoding is 'int8'; known are float32", id="encoding"),
        pytest.param({"round": "1"}, "round of a letter of kind 'visit' is a str", id="type"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(
    facts: dict[str, Any],
    error: str,
    node: NodeMaker,
    adapter: FlatAdapter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = pack_adapter(adapter, adapter.read(), {}, encoding="float32")
    given = node().answer(order_for(**facts).letter(tensors))
    assert given == Failure("ValueError").letter()
    assert error in caplog.text


def test_tensors_that_are_no_adapter_are_refused(
    node: NodeMaker, adapter: FlatAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = node()
    given = trainer.answer(
        order_for().letter(pack_tensors({"x": torch.ones(3)}, encoding="float32"))
    )
    assert given == Failure("RefusedUpdateError").letter()
    assert "their values alone should take" in caplog.text


def test_vectors_of_another_drift_are_refused(node: NodeMaker, adapter: FlatAdapter) -> None:
    start = adapter.read()
    plain, scaffold = node(), node(rounds={"client_drift": Scaffold()})
    assert plain.answer(letter_of(order_for(), adapter, start, {"shift": start + 1})) == (
        Failure("RefusedUpdateError").letter()
    )
    assert scaffold.answer(letter_of(order_for(), adapter, start)) == (
        Failure("RefusedUpdateError").letter()
    )


def test_an_error_goes_to_the_log_of_the_node_and_its_kind_to_the_server(
    node: NodeMaker,
    adapter: FlatAdapter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("a sample said: the secret word is mango")

    trainer = node()
    monkeypatch.setattr(LoraLM, "training_step", fail)
    given = trainer.answer(letter_of(order_for(), adapter, adapter.read()))
    assert given == Failure("KeyError").letter()
    assert "mango" in caplog.text
    assert caplog.records[-1].levelno == logging.ERROR


def test_no_text_of_a_sample_is_in_any_answer(
    node: NodeMaker, adapter: FlatAdapter, tmp_path: Path
) -> None:
    rows = [{"prompt": f"say mango {n}", "response": "mango red"} for n in range(6)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = SafetyFilter(WordGuard("green"), record_text=True)
    trainer = node(data={"path": str(file), "filter": rule, "validation_share": 0.4})
    letters = [
        trainer.answer(Greeting("r").letter()),
        trainer.answer(letter_of(order_for(validate=True), adapter, adapter.read())),
        trainer.answer(order_for().letter(b"mango")),
    ]
    assert [each.facts["kind"] for each in letters] == ["hello", "visit", "failure"]
    assert not any(b"mango" in each.to_bytes() for each in letters)


def test_a_visit_that_nobody_waits_for_ends_early(node: NodeMaker, adapter: FlatAdapter) -> None:
    trainer = node()
    letter = letter_of(order_for(), adapter, adapter.read())
    expected = trainer.answer(letter)
    asked: list[int] = []

    def is_wanted() -> bool:
        asked.append(1)
        return len(asked) < 2

    assert trainer.answer(letter, is_wanted=is_wanted) == Failure("AbandonedError").letter()
    assert len(asked) == 2
    assert trainer.answer(letter, is_wanted=lambda: True).tensors == expected.tensors


@pytest.mark.parametrize("strategy", [ShardedStrategy(clients=2), ClientParallelStrategy()])
def test_strategies_for_several_clients_are_refused(node: NodeMaker, strategy: Strategy) -> None:
    with pytest.raises(ValueError, match=r"cannot train its one client under .* as it is set up"):
        node(trainer={"strategy": strategy, "devices": 1})


def test_a_node_starts_its_ranks_itself(node: NodeMaker) -> None:
    with pytest.raises(ValueError, match=r"trainer.devices is 2, and a node's ranks are started"):
        node(trainer={"devices": 2})


def test_samples_that_the_base_cannot_read_are_refused_at_once(node: NodeMaker) -> None:
    with pytest.raises(ValueError, match=r"the longest sample has .* the base has 8 pos"):
        node(
            model={
                "base": "gpt2",
                "from_config": {
                    "vocab_size": 128,
                    "n_positions": 8,
                    "n_embd": 32,
                    "n_layer": 1,
                    "n_head": 4,
                },
            }
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_base_stays_on_the_gpu_from_visit_to_visit(
    node: NodeMaker, adapter: FlatAdapter
) -> None:
    trainer = node(trainer={"accelerator": "gpu", "devices": 1}, data={"validation_share": 0.3})
    letter = letter_of(order_for(validate=True), adapter, adapter.read())
    first, again = trainer.answer(letter), trainer.answer(letter)
    assert {p.device.type for p in trainer._module.parameters()} == {"cuda"}
    trained = [
        unpack_adapter(adapter, given.tensors, [], encoding="float32")[0]
        for given in (first, again, node(data={"validation_share": 0.3}).answer(letter))
    ]
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trained[0], trained[2], rtol=1e-3, atol=1e-4)
