"""Each rule against the formulas of Reddi et al. (2021) and Hsu et al. (2019), in float64 numpy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsafe.federated.server_optimizer import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
)

RandomAdapters = Callable[..., list[Tensor]]
NumpyRule = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]
NUM_ROUNDS = 6


def momentum_rule(x: np.ndarray, means: list[np.ndarray]) -> np.ndarray:
    """Hsu et al. (2019), FedAvgM: v <- 0.7 v + Delta, x <- x + 0.5 v."""
    v = np.zeros_like(x)
    for mean in means:
        v = 0.7 * v + (mean - x)
        x = x + 0.5 * v
    return x


def adaptive_rule(second_moment: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> NumpyRule:
    """Reddi et al. (2021), Algorithm 2, with eta 0.05, beta1 0.8, tau 0.01."""

    def rule(x: np.ndarray, means: list[np.ndarray]) -> np.ndarray:
        m, v = np.zeros_like(x), np.full_like(x, 0.01**2)
        for mean in means:
            delta = mean - x
            m = 0.8 * m + 0.2 * delta
            v = second_moment(v, delta)
            x = x + 0.05 * m / (np.sqrt(v) + 0.01)
        return x

    return rule


RULES: list[tuple[ServerOptimizer, NumpyRule]] = [
    (FedAvg(), lambda x, means: means[-1]),
    (FedAvg(learning_rate=1.0), lambda x, means: means[-1]),
    (FedAvgM(momentum=0.7, learning_rate=0.5), momentum_rule),
    (
        FedAdagrad(learning_rate=0.05, beta1=0.8, tau=0.01),
        adaptive_rule(lambda v, delta: v + delta**2),
    ),
    (
        FedAdam(learning_rate=0.05, beta1=0.8, beta2=0.95, tau=0.01),
        adaptive_rule(lambda v, delta: 0.95 * v + 0.05 * delta**2),
    ),
    (
        FedYogi(learning_rate=0.05, beta1=0.8, beta2=0.95, tau=0.01),
        adaptive_rule(lambda v, delta: v - 0.05 * delta**2 * np.sign(v - delta**2)),
    ),
]


def run(optimizer: ServerOptimizer, start: Tensor, means: list[Tensor]) -> Tensor:
    for mean in means:
        start = optimizer.step(start, mean)
    return start


@pytest.mark.oracle
@pytest.mark.parametrize(("optimizer", "rule"), RULES, ids=lambda x: type(x).__name__)
def test_rounds_follow_the_papers_formula(
    random_adapters: RandomAdapters, optimizer: ServerOptimizer, rule: NumpyRule
) -> None:
    optimizer.load_state_dict({})
    start, *means = random_adapters(NUM_ROUNDS + 1)
    means = [m * 10.0 ** (i - 3) for i, m in enumerate(means)]  # both sides of Yogi's sign
    expected = rule(start.double().numpy(), [m.double().numpy() for m in means])
    np.testing.assert_allclose(run(optimizer, start, means), expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(("optimizer", "rule"), RULES, ids=lambda x: type(x).__name__)
def test_state_carries_on_bit_for_bit_and_arguments_stay(
    random_adapters: RandomAdapters, optimizer: ServerOptimizer, rule: NumpyRule
) -> None:
    optimizer.load_state_dict({})
    start, *means = random_adapters(NUM_ROUNDS + 1)
    kept = [tensor.clone() for tensor in (start, *means)]
    middle = run(optimizer, start, means[:3])
    saved = {name: moment.clone() for name, moment in optimizer.state_dict().items()}
    expected = run(optimizer, middle, means[3:])
    optimizer.load_state_dict(saved)
    assert torch.equal(run(optimizer, middle, means[3:]), expected)
    assert all(torch.equal(a, b) for a, b in zip(kept, (start, *means), strict=True))


def test_fedavg_takes_the_mean_exactly(random_adapters: RandomAdapters) -> None:
    start, mean = random_adapters(2)
    start *= 1e6
    assert torch.equal(FedAvg().step(start, mean), mean)


def test_fedavg_with_half_a_step_stops_half_way(random_adapters: RandomAdapters) -> None:
    start, mean = random_adapters(2)
    half_way = FedAvg(learning_rate=0.5).step(start, mean)
    torch.testing.assert_close(half_way, (start + mean) / 2)


def test_fedavgm_without_momentum_is_fedavg(random_adapters: RandomAdapters) -> None:
    start, *means = random_adapters(4)
    torch.testing.assert_close(run(FedAvgM(momentum=0.0), start, means), means[-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAvg(learning_rate=0.0), "learning_rate of the server optimizer is 0.0"),
        (lambda: FedAvgM(momentum=1.0), "momentum of the server optimizer is 1.0"),
        (lambda: FedAvgM(learning_rate=-1.0), "learning_rate of the server optimizer is -1.0"),
        (lambda: FedAdam(beta1=-0.1), "beta1 of the server optimizer is -0.1"),
        (lambda: FedAdam(beta2=1.0), "beta2 of the server optimizer is 1.0"),
        (lambda: FedYogi(beta2=1.5), "beta2 of the server optimizer is 1.5"),
        (lambda: FedAdagrad(tau=0.0), "tau of the server optimizer is 0.0"),
    ],
)
def test_a_value_out_of_range_is_refused(make: Callable[[], ServerOptimizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
