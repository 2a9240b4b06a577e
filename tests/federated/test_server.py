import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsafe.federated.aggregation import SKETCH_WIDTH
from fedsafe.federated.client_drift import Scaffold
from fedsafe.federated.server import Server, Update
from fedsafe.federated.server_optimizer import FedAvg, FedAvgM

RandomAdapters = Callable[..., list[Tensor]]


def make_server(start: Tensor, **settings: Any) -> Server:
    return Server(start, **({"optimizer": FedAvg(), "drift": None} | settings))


def receive(server: Server, client: int, adapter: Tensor, *, weight: float = 1.0) -> None:
    update = Update(adapter, loss=float(client), num_steps=2, num_tokens=10 * (client + 1))
    server.receive(client, update, name=f"client-{client}", weight=weight, num_samples=7)


def test_a_round_takes_the_weighted_mean_and_records_it(random_adapters: RandomAdapters) -> None:
    start, *adapters = random_adapters(4, size=SKETCH_WIDTH)
    server, weights = make_server(start), [1.0, 2.0, 5.0]
    for client, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        receive(server, client, adapter, weight=weight)
    record = server.close_round(num_clients=9)
    rows = np.stack([a.double().numpy() for a in adapters])
    mean, x = np.average(rows, 0, weights), start.double().numpy()
    np.testing.assert_allclose(server.adapter, mean, atol=1e-6)
    change = mean - x
    assert record["update_norm"] == pytest.approx(np.linalg.norm(change), rel=1e-5)
    assert record["adapter_norm"] == pytest.approx(np.linalg.norm(mean), rel=1e-5)
    assert record["tokens"] == 10 + 20 + 30
    assert record["loss"] == pytest.approx((0 * 10 + 1 * 20 + 2 * 30) / 60)
    for own, client in zip(rows - x, record["clients"], strict=True):
        cosine = own @ change / np.linalg.norm(own) / np.linalg.norm(change)
        assert client["cosine_to_mean"] == pytest.approx(cosine, abs=1e-5)
        assert client["update_norm"] == pytest.approx(np.linalg.norm(own), rel=1e-5)


def test_the_next_round_knows_nothing_of_the_last(random_adapters: RandomAdapters) -> None:
    start, first, second = random_adapters(3)
    server = make_server(start)
    receive(server, 0, first)
    server.close_round(num_clients=2)
    receive(server, 1, second)
    record = server.close_round(num_clients=2)
    assert torch.equal(server.adapter, second)
    assert [c["client"] for c in record["clients"]] == ["client-1"]
    assert record["bytes_up"] == record["bytes_down"] == 50 * 4


def test_a_refused_update_is_recorded_with_its_reason(random_adapters: RandomAdapters) -> None:
    start, good, bad = random_adapters(3)
    bad[0] = math.nan
    server = make_server(start)
    receive(server, 0, bad)
    receive(server, 1, good[:49])
    receive(server, 2, good)
    server.note_failure("client-3")
    record = server.close_round(num_clients=4)
    assert torch.equal(server.adapter, good)
    assert [(c["client"], c["status"]) for c in record["clients"]] == [
        ("client-0", "refused"),
        ("client-1", "refused"),
        ("client-2", "ok"),
        ("client-3", "failed"),
    ]
    assert record["clients"][0]["reason"] == "1 of 50 values are not finite"
    assert "shape (49,), the global one (50,)" in record["clients"][1]["reason"]
    assert record["tokens"] == 30, "only accepted updates count"
    assert record["bytes_down"] == 4 * 50 * 4
    assert record["bytes_up"] == 3 * 50 * 4


def test_what_became_of_a_visit_is_recorded_with_what_travelled(
    random_adapters: RandomAdapters,
) -> None:
    start, good = random_adapters(2)
    server = Server(start, optimizer=FedAvg(), drift=None, bytes_per_value=2)
    receive(server, 0, good)
    server.note_failure("client-1", "late", reason="no answer within 9 s")
    server.note_failure("client-2", "refused", reason="of another run")
    server.count_bytes(up=7)
    server.note_failure("client-3", was_sent=False)
    record = server.close_round(num_clients=4)
    assert record["clients"][1:] == [
        {"client": "client-1", "status": "late", "reason": "no answer within 9 s"},
        {"client": "client-2", "status": "refused", "reason": "of another run"},
        {"client": "client-3", "status": "failed"},
    ]
    assert record["bytes_down"] == 3 * 50 * 2
    assert record["bytes_up"] == 50 * 2 + 7


def test_a_round_without_an_update_changes_nothing(random_adapters: RandomAdapters) -> None:
    start, bad = random_adapters(2)
    kept = start.clone()
    server = make_server(start)
    receive(server, 0, bad * math.inf)
    server.note_failure("client-1")
    with pytest.raises(ValueError, match=r"client-0: 50 of 50 .* finite; client-1: failed\); noth"):
        server.close_round(num_clients=2)
    assert torch.equal(server.adapter, kept)


def test_isolated_clients_keep_their_own_adapters(random_adapters: RandomAdapters) -> None:
    start, first, second = random_adapters(3)
    server = make_server(start, isolated=True)
    receive(server, 0, first)
    server.close_round(num_clients=2)
    assert torch.equal(server.start_of(0), first)
    assert torch.equal(server.start_of(1), start)
    receive(server, 0, second)
    record = server.close_round(num_clients=2)
    assert record["clients"][0]["update_norm"] == pytest.approx((second - first).norm().item())
    assert torch.equal(server.adapter, start)


def test_a_new_server_starts_without_what_an_earlier_one_left(
    random_adapters: RandomAdapters,
) -> None:
    start, adapter = random_adapters(2)
    optimizer, drift = FedAvgM(), Scaffold()
    for _ in range(2):
        server = make_server(start, optimizer=optimizer, drift=drift)
        assert optimizer.state_dict() == {}
        receive(server, 0, adapter)
        server.close_round(num_clients=1)
        assert optimizer.state_dict()
    torch.testing.assert_close(server.adapter, adapter)


def test_a_round_goes_on_from_a_saved_state(random_adapters: RandomAdapters) -> None:
    start, *adapters = random_adapters(4)
    servers = []
    for resumes in (False, True):
        server = make_server(start.clone(), optimizer=FedAvgM(momentum=0.5))
        receive(server, 0, adapters[0])
        server.close_round(num_clients=3)
        receive(server, 1, adapters[1], weight=3.0)
        if resumes:
            state = server.state_dict()
            server = make_server(torch.zeros(50), optimizer=FedAvgM(momentum=0.5))
            server.load_state_dict(state)
        receive(server, 2, adapters[2])
        servers.append((server, server.close_round(num_clients=3)))
    (whole, expected), (resumed, record) = servers
    assert torch.equal(resumed.adapter, whole.adapter)
    assert record == expected


def test_an_update_whose_control_variate_is_not_finite_leaves_nothing_behind(
    random_adapters: RandomAdapters,
) -> None:
    start, good, bad = random_adapters(3)
    drift = Scaffold()
    server = make_server(start, drift=drift)
    for client, gradient in enumerate((good, bad * math.inf)):
        correction = server.correction_for(client)
        correction.gradient_sum += gradient
        correction.num_steps = 1
        update = Update(good, loss=1.0, num_steps=1, num_tokens=10)
        name = f"client-{client}"
        server.receive(client, update, name=name, weight=1.0, num_samples=7, correction=correction)
    record = server.close_round(num_clients=2)
    assert [c["status"] for c in record["clients"]] == ["ok", "refused"]
    assert record["clients"][1]["reason"].startswith("50 of 50 values of the control variate")
    assert record["tokens"] == 10
    torch.testing.assert_close(drift.server_control, good / 2)
    assert sorted(drift.client_controls) == [0]
