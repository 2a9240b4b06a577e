"""Each rank's server, after the exchange, is the one that received every client itself."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from thread_peers import together
from torch import Tensor

from fedsafe.federated.client_drift import ClientDrift, FedProx, Scaffold
from fedsafe.federated.exchange import ExchangeMode, RoundExchange
from fedsafe.federated.server import Server, Update
from fedsafe.federated.server_optimizer import FedAdam, FedAvg, FedAvgM, ServerOptimizer
from fedsafe.peers import ALONE, Peers

SIZE = 50
NUM_CLIENTS = 6
NO_NUMBER = math.nan
TOLERANCE: dict[ExchangeMode, float] = {"sums": 1e-6, "updates": 0.0}
"""How near to one process the ranks must be."""


@dataclass(frozen=True)
class Round:
    """Who trains what: the ranks of the clients, in the order of their visits."""

    owners: Mapping[int, int]
    bad_adapters: tuple[int, ...] = ()
    bad_gradients: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()


@dataclass
class Outcome:
    """What a server was like after the last round, and the records of all."""

    adapter: Tensor
    state: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)


ROUNDS = [
    Round({1: 0, 2: 1, 3: 1, 5: 0}),
    Round({0: 1, 2: 1, 4: 0}, failed=(1,)),
    Round({3: 0}),
    Round({1: 1, 2: 0, 3: 0}, bad_adapters=(2,)),
]
"""On two ranks: shared evenly, not evenly, by one of them alone, with a refused update."""


def update_of(round_: int, client: int, *, bad: bool) -> Update:
    generator = torch.Generator().manual_seed(100 * round_ + client)
    adapter = torch.randn(SIZE, generator=generator)
    if bad:
        adapter[7] = NO_NUMBER
    return Update(adapter, loss=1.0 + client, num_steps=2, num_tokens=10 * (client + 1))


def federate(
    peers: Peers,
    mode: ExchangeMode,
    rounds: list[Round],
    *,
    optimizer: Callable[[], ServerOptimizer] = FedAvg,
    drift: Callable[[], ClientDrift] | None = None,
    isolated: bool = False,
) -> Outcome:
    """Play rounds as one of the peers; alone, as the process that trains all clients."""
    made = drift() if drift is not None else None
    server = Server(torch.ones(SIZE), optimizer=optimizer(), drift=made, isolated=isolated)
    exchange, records = RoundExchange(server, peers, mode), []
    for number, each in enumerate(rounds):
        for client, owner in each.owners.items():
            if peers.size == 1 or owner == peers.index:
                visit(server, exchange, number, client, each)
        exchange.settle(each.owners)
        for client in each.failed:
            server.note_failure(f"client-{client}")
        records.append(server.close_round(num_clients=NUM_CLIENTS))
    return Outcome(server.adapter, server.state_dict(), records)


def visit(server: Server, exchange: RoundExchange, number: int, client: int, each: Round) -> None:
    correction = server.correction_for(client)
    if correction is not None and "gradient_sum" in correction.state_dict():
        gradient = update_of(number, client + 50, bad=client in each.bad_gradients).adapter
        correction.load_state_dict({"gradient_sum": 2 * gradient, "num_steps": 2})
    exchange.receive(
        client,
        update_of(number, client, bad=client in each.bad_adapters),
        name=f"client-{client}",
        weight=0.1 * (client + 1),
        num_samples=7 + client,
        correction=correction,
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavgm": {"optimizer": FedAvgM},
    "fedadam": {"optimizer": FedAdam},
    "fedprox": {"drift": FedProx},
    "scaffold": {"drift": Scaffold},
    "scaffold with fedadam": {"drift": Scaffold, "optimizer": FedAdam},
}


def assert_same(a: Any, b: Any, *, tolerance: float = 0.0) -> None:
    """The same, whatever it is made of: without a tolerance, bit for bit."""
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name], tolerance=tolerance)
    elif isinstance(a, list):
        for mine, yours in zip(a, b, strict=True):
            assert_same(mine, yours, tolerance=tolerance)
    else:
        assert a == b


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_exchanged_updates_give_what_one_process_gives_bit_for_bit(
    settings: dict[str, Any],
) -> None:
    expected = federate(ALONE, "updates", ROUNDS, **settings)
    for outcome in together(2, lambda peers: federate(peers, "updates", ROUNDS, **settings)):
        assert_same(vars(outcome), vars(expected))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_exchanged_sums_give_what_one_process_gives_to_rounding(settings: dict[str, Any]) -> None:
    expected = federate(ALONE, "sums", ROUNDS, **settings)
    outcomes = together(2, lambda peers: federate(peers, "sums", ROUNDS, **settings))
    assert_same(vars(outcomes[0]), vars(outcomes[1]))
    assert_same(vars(outcomes[0]), vars(expected), tolerance=1e-6)


@pytest.mark.parametrize("mode", ["sums", "updates"])
def test_more_ranks_than_clients_are_no_trouble(mode: ExchangeMode) -> None:
    rounds = [Round({1: 2, 4: 0}), Round({2: 3})]
    expected = federate(ALONE, mode, rounds, drift=Scaffold)
    for outcome in together(4, lambda peers: federate(peers, mode, rounds, drift=Scaffold)):
        assert_same(vars(outcome), vars(expected), tolerance=TOLERANCE[mode])


@pytest.mark.parametrize("mode", ["sums", "updates"])
@pytest.mark.parametrize(
    "bad", [{"bad_adapters": (0, 2)}, {"bad_gradients": (0, 2)}], ids=["adapters", "gradients"]
)
def test_a_rank_whose_updates_are_all_refused_leaves_the_others_alone(
    mode: ExchangeMode, bad: dict[str, Any]
) -> None:
    rounds = [Round({0: 1, 1: 0, 2: 1}, **bad), Round({1: 1, 2: 0})]
    expected = federate(ALONE, mode, rounds, drift=Scaffold)
    assert [c["status"] for c in expected.records[0]["clients"]] == ["refused", "ok", "refused"]
    for outcome in together(2, lambda peers: federate(peers, mode, rounds, drift=Scaffold)):
        assert_same(vars(outcome), vars(expected), tolerance=TOLERANCE[mode])


@pytest.mark.parametrize("mode", ["sums", "updates"])
def test_a_round_that_no_update_survives_ends_alike_on_every_rank(mode: ExchangeMode) -> None:
    rounds = [Round({0: 0, 3: 1}, bad_adapters=(0, 3), failed=(5,))]

    def message(peers: Peers) -> str:
        with pytest.raises(ValueError, match="no update to average") as caught:
            federate(peers, mode, rounds)
        return str(caught.value)

    expected = message(ALONE)
    assert "client-0: 1 of 50 values" in expected
    assert "client-5: failed" in expected
    assert together(2, message) == [expected, expected]


@pytest.mark.parametrize("mode", ["sums", "updates"])
def test_a_round_of_failures_alone_ends_alike_too(mode: ExchangeMode) -> None:
    def message(peers: Peers) -> str:
        with pytest.raises(ValueError, match="no update to average") as caught:
            federate(peers, mode, [Round({}, failed=(2, 5))], drift=Scaffold)
        return str(caught.value)

    assert together(2, message) == [message(ALONE)] * 2


@pytest.mark.parametrize("mode", ["sums", "updates"])
def test_clients_that_go_on_alone_are_known_to_every_rank(mode: ExchangeMode) -> None:
    expected = federate(ALONE, mode, ROUNDS, isolated=True)
    assert expected.state["own_adapters"].keys() == {0, 1, 2, 3, 4, 5}
    for outcome in together(2, lambda peers: federate(peers, mode, ROUNDS, isolated=True)):
        assert_same(vars(outcome), vars(expected))


def test_a_rank_keeps_no_update_where_sums_are_exchanged() -> None:
    def kept_bytes(peers: Peers) -> int:
        server = Server(torch.ones(SIZE), optimizer=FedAvg(), drift=None)
        exchange = RoundExchange(server, peers, "sums")
        each = Round({client: client % 2 for client in range(NUM_CLIENTS)})
        for client, owner in each.owners.items():
            if owner == peers.index:
                visit(server, exchange, 0, client, each)
        kept = len(exchange._kept)
        exchange.settle(each.owners)
        return kept

    assert together(2, kept_bytes) == [0, 0]


def test_an_unknown_exchange_is_refused() -> None:
    server = Server(torch.ones(SIZE), optimizer=FedAvg(), drift=None)
    with pytest.raises(ValueError, match="exchange is 'sum'; give 'sums' or 'updates'"):
        RoundExchange(server, ALONE, "sum")  # type: ignore[arg-type]
