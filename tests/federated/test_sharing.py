import random
from itertools import product

import pytest

from fedsafe.federated.sharing import balanced


def load(costs: list[float], owners: list[int], num_groups: int) -> float:
    sums = [0.0] * num_groups
    for cost, owner in zip(costs, owners, strict=True):
        sums[owner] += cost
    return max(sums)


def test_the_dearest_visit_comes_first_and_goes_to_the_idlest_group() -> None:
    assert balanced([1, 5, 3, 2], 2) == [0, 0, 1, 1]


def test_one_group_gets_everything_and_many_groups_get_one_each() -> None:
    assert balanced([3, 1, 2], 1) == [0, 0, 0]
    assert sorted(balanced([3, 1, 2], 5)) == [0, 1, 2]
    assert balanced([], 2) == []


def test_equal_costs_are_dealt_in_order() -> None:
    assert balanced([1.0] * 5, 2) == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("num_groups", [2, 3])
def test_no_assignment_is_much_better(num_groups: int) -> None:
    rng = random.Random(num_groups)
    for _ in range(20):
        costs = [float(rng.randint(1, 50)) for _ in range(7)]
        assignments = product(range(num_groups), repeat=len(costs))
        best = min(load(costs, list(owners), num_groups) for owners in assignments)
        assert load(costs, balanced(costs, num_groups), num_groups) <= 4 / 3 * best
