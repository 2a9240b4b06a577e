from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedsafe.federated.aggregation import RefusedUpdateError
from fedsafe.federated.client_drift import Correction, FedProx, Scaffold
from fedsafe.model.flat_adapter import WholeAdapter

RandomAdapters = Callable[..., list[Tensor]]
SIZE = 50


@pytest.fixture
def adapter() -> WholeAdapter:
    """Fifty parameters in two tensors."""
    model = nn.ParameterDict({"a": torch.zeros(6, 5), "b": torch.zeros(20)})
    return WholeAdapter(model.named_parameters())


def set_gradient(adapter: WholeAdapter, gradient: Tensor) -> None:
    for parameter, part in zip(adapter.parameters, adapter.views(gradient), strict=True):
        parameter.grad = part.clone()


def corrected(adapter: WholeAdapter, correction: Correction, gradient: Tensor) -> Tensor:
    set_gradient(adapter, gradient)
    correction.apply(adapter)
    return torch.cat([part.flatten() for part in adapter.gradients()])


def test_fedprox_adds_the_gradient_of_its_term(
    adapter: WholeAdapter, random_adapters: RandomAdapters
) -> None:
    start, now, gradient = random_adapters(3)
    adapter.write(now)
    w = now.clone().requires_grad_()
    (0.3 / 2 * (w - start).square().sum()).backward()
    assert w.grad is not None
    result = corrected(adapter, FedProx(mu=0.3).correction(0, start), gradient)
    torch.testing.assert_close(result, gradient + w.grad)


def test_fedprox_refuses_a_push() -> None:
    with pytest.raises(ValueError, match=r"mu of FedProx is -0.1; give 0 or more"):
        FedProx(mu=-0.1)


def visit(
    scaffold: Scaffold, adapter: WholeAdapter, client: int, gradients: list[Tensor]
) -> list[Tensor]:
    """One visit; returns the corrected gradients."""
    correction = scaffold.correction(client, torch.zeros(SIZE))
    results = [corrected(adapter, correction, gradient) for gradient in gradients]
    scaffold.collect(client, correction)
    return results


def test_scaffold_moves_both_sides_as_the_paper_says(
    adapter: WholeAdapter, random_adapters: RandomAdapters
) -> None:
    scaffold, num_clients = Scaffold(), 10
    c = torch.zeros(SIZE)
    controls = {0: torch.zeros(SIZE), 1: torch.zeros(SIZE), 2: torch.zeros(SIZE)}
    for seed, clients in enumerate([(0, 1), (1, 2), (0, 2), (0, 1)]):
        change = torch.zeros(SIZE)
        for client in clients:
            gradients = random_adapters(3, seed=10 * seed + client)
            results = visit(scaffold, adapter, client, gradients)
            for result, gradient in zip(results, gradients, strict=True):
                torch.testing.assert_close(result, gradient - controls[client] + c)
            new = torch.stack(gradients).mean(0)
            change += new - controls[client]
            controls[client] = new
        scaffold.end_round(num_clients)
        c = c + change / num_clients
    assert c.abs().max() > 0.01


def test_the_first_round_of_scaffold_corrects_nothing_bit_for_bit(
    adapter: WholeAdapter, random_adapters: RandomAdapters
) -> None:
    gradients = random_adapters(3)
    results = visit(Scaffold(), adapter, 4, gradients)
    assert all(torch.equal(a, b) for a, b in zip(results, gradients, strict=True))


def test_a_visit_that_was_not_accepted_is_forgotten(
    adapter: WholeAdapter, random_adapters: RandomAdapters
) -> None:
    scaffold = Scaffold()
    (gradient,) = random_adapters(1)
    corrected(adapter, scaffold.correction(0, torch.zeros(SIZE)), gradient)
    scaffold.end_round(2)
    assert scaffold.state_dict() == {}


def test_scaffold_goes_on_from_its_state_inside_a_visit_and_a_round(
    adapter: WholeAdapter, random_adapters: RandomAdapters
) -> None:
    whole, cut = Scaffold(), Scaffold()
    first, second = random_adapters(2, seed=1), random_adapters(2, seed=2)
    for scaffold in (whole, cut):
        visit(scaffold, adapter, 0, first)
        scaffold.end_round(3)
        visit(scaffold, adapter, 1, first)
    visit(whole, adapter, 0, second)
    begun = cut.correction(0, torch.zeros(SIZE))
    corrected(adapter, begun, second[0])
    resumed = Scaffold()
    resumed.load_state_dict({k: v.clone() for k, v in cut.state_dict().items()})
    correction = resumed.correction(0, torch.zeros(SIZE))
    correction.load_state_dict(begun.state_dict())
    corrected(adapter, correction, second[1])
    resumed.collect(0, correction)
    for scaffold in (whole, resumed):
        scaffold.end_round(3)
    expected, state = whole.state_dict(), resumed.state_dict()
    assert state.keys() == expected.keys() == {"client.0", "client.1", "server"}
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_control_variate_that_is_not_finite_is_refused(
    adapter: WholeAdapter, random_adapters: RandomAdapters, value: float
) -> None:
    good, bad = random_adapters(2)
    bad[7] = value
    correction = Scaffold().correction(0, torch.zeros(SIZE))
    corrected(adapter, correction, good)
    correction.check()
    corrected(adapter, correction, bad)
    with pytest.raises(RefusedUpdateError, match="1 of 50 values of the control variate are not"):
        correction.check()


def test_what_scaffold_restored_follows_the_adapter_to_its_device(
    adapter: WholeAdapter, random_adapters: RandomAdapters
) -> None:
    scaffold = Scaffold()
    visit(scaffold, adapter, 0, random_adapters(2))
    scaffold.end_round(2)
    visit(scaffold, adapter, 0, random_adapters(2))  # a change that waits on the CPU
    elsewhere = torch.zeros(SIZE, device="meta")
    correction = scaffold.correction(0, elsewhere)
    correction.num_steps = 1  # type: ignore[attr-defined]
    scaffold.collect(0, correction)
    scaffold.end_round(2)
    assert {value.device.type for value in scaffold.state_dict().values()} == {"meta"}
