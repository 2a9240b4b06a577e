import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsafe.federated.aggregation import (
    SKETCH_WIDTH,
    RefusedUpdateError,
    WeightedMean,
    cosines_to_mean,
    sketch,
    sketch_signs,
)

RandomAdapters = Callable[..., list[Tensor]]


def numpy_mean(adapters: list[Tensor], weights: list[float]) -> np.ndarray:
    return np.average(np.stack([a.numpy().astype(np.float64) for a in adapters]), 0, weights)


def exact_cosines(updates: list[Tensor], weights: list[float]) -> np.ndarray:
    rows = np.stack([u.numpy().astype(np.float64) for u in updates])
    mean = np.average(rows, 0, weights)
    return rows @ mean / np.linalg.norm(rows, axis=1) / np.linalg.norm(mean)


def sketched_cosines(updates: list[Tensor], weights: list[float]) -> Tensor:
    signs = sketch_signs(updates[0])
    sketches = torch.stack([sketch(update, signs) for update in updates])
    return cosines_to_mean(sketches, torch.tensor(weights))


def test_mean_is_weighted_by_the_clients_weights(random_adapters: RandomAdapters) -> None:
    adapters, weights = random_adapters(4), [3.0, 1.0, 250.0, 0.5]
    mean = WeightedMean(adapters[0])
    for adapter, weight in zip(adapters, weights, strict=True):
        mean.add(adapter, weight=weight)
    np.testing.assert_allclose(mean.mean().numpy(), numpy_mean(adapters, weights), rtol=1e-5)
    assert (mean.count, mean.weight) == (4, sum(weights))


def test_mean_of_one_client_is_that_client(random_adapters: RandomAdapters) -> None:
    (adapter,) = random_adapters(1)
    mean = WeightedMean(adapter)
    mean.add(adapter, weight=8.0)
    assert torch.equal(mean.mean(), adapter)


def test_adding_leaves_the_adapters_as_they_were(random_adapters: RandomAdapters) -> None:
    first, second = random_adapters(2)
    kept = first.clone()
    mean = WeightedMean(first)
    mean.add(first, weight=2.0)
    mean.add(second, weight=1.0)
    mean.mean().zero_()
    assert torch.equal(first, kept)
    assert mean.total.abs().sum() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_and_changes_nothing(
    random_adapters: RandomAdapters, bad: float
) -> None:
    good, other = random_adapters(2)
    mean = WeightedMean(good)
    mean.add(good, weight=1.0)
    other[[3, 7]] = bad
    with pytest.raises(RefusedUpdateError, match="2 of 50 values are not finite"):
        mean.add(other, weight=1.0)
    assert torch.equal(mean.mean(), good)
    assert mean.count == 1


def test_another_shape_is_refused_and_changes_nothing(random_adapters: RandomAdapters) -> None:
    (good,) = random_adapters(1)
    mean = WeightedMean(good)
    mean.add(good, weight=1.0)
    with pytest.raises(RefusedUpdateError, match=r"shape \(49,\), the global one \(50,\)"):
        mean.add(good[:49], weight=1.0)
    assert torch.equal(mean.mean(), good)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
def test_a_weight_must_be_positive(random_adapters: RandomAdapters, weight: float) -> None:
    (adapter,) = random_adapters(1)
    with pytest.raises(ValueError, match=f"weight is {weight}; .* must be above 0"):
        WeightedMean(adapter).add(adapter, weight=weight)


def test_a_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no update to average"):
        WeightedMean(torch.zeros(3)).mean()


def test_a_mean_continues_from_its_state(random_adapters: RandomAdapters) -> None:
    adapters = random_adapters(3)
    whole, first_part = WeightedMean(adapters[0]), WeightedMean(adapters[0])
    for adapter in adapters:
        whole.add(adapter, weight=2.0)
    first_part.add(adapters[0], weight=2.0)
    resumed = WeightedMean(adapters[0])
    resumed.load_state_dict(first_part.state_dict())
    for adapter in adapters[1:]:
        resumed.add(adapter, weight=2.0)
    assert torch.equal(resumed.mean(), whole.mean())


def test_cosines_of_small_adapters_are_exact(random_adapters: RandomAdapters) -> None:
    updates, weights = random_adapters(5, size=SKETCH_WIDTH), [1.0, 2.0, 3.0, 4.0, 50.0]
    expected = exact_cosines(updates, weights)
    np.testing.assert_allclose(sketched_cosines(updates, weights), expected, atol=1e-5)


@pytest.mark.parametrize("size", [SKETCH_WIDTH + 1, 100_003])
def test_cosines_of_large_adapters_are_close(random_adapters: RandomAdapters, size: int) -> None:
    shared, *own = random_adapters(6, size=size)
    updates = [shared + i * update for i, update in enumerate(own)]
    weights = [1.0, 2.0, 1.0, 3.0, 1.0]
    expected = exact_cosines(updates, weights)
    np.testing.assert_allclose(sketched_cosines(updates, weights), expected, atol=0.05)


def test_signs_are_the_same_in_every_run_and_balanced() -> None:
    like = torch.zeros(10_000)
    torch.manual_seed(1)
    first = sketch_signs(like)
    torch.manual_seed(2)
    assert torch.equal(first, sketch_signs(like))
    assert set(first.tolist()) == {-1, 1}
    assert abs(first.float().mean()) < 0.05


def test_cosine_of_a_zero_update_is_zero(random_adapters: RandomAdapters) -> None:
    (update,) = random_adapters(1)
    assert sketched_cosines([update, torch.zeros(50)], [1.0, 1.0])[1] == 0
