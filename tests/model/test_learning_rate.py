from typing import Any

import pytest

from fedsafe.model.learning_rate import learning_rate_factor


def factors(num_rounds: int, *, step: int = 0, **settings: Any) -> list[float]:
    defaults = {"schedule": "constant", "floor": 0.0, "warmup_rounds": 0, "warmup_steps": 0}
    return [
        learning_rate_factor(
            round_=round_, num_rounds=num_rounds, step=step, **(defaults | settings)
        )
        for round_ in range(num_rounds)
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"schedule": "cosine"}, [1, 0.853553, 0.5, 0.146447]),
        ({"schedule": "cosine", "floor": 0.2}, [1, 0.882843, 0.6, 0.317157]),
        ({"schedule": "cosine", "floor": 1.0}, [1, 1, 1, 1]),
        ({"warmup_rounds": 2}, [0.5, 1, 1, 1]),
        ({"schedule": "cosine", "warmup_rounds": 4}, [0.25, 0.426777, 0.375, 0.146447]),
        ({"warmup_rounds": 8}, [0.125, 0.25, 0.375, 0.5]),
    ],
)
def test_the_rate_over_rounds(settings: dict[str, Any], expected: list[float]) -> None:
    assert factors(4, **settings) == pytest.approx(expected, abs=1e-6)


def test_the_rate_rises_at_the_start_of_every_visit() -> None:
    rises = [factors(3, step=step, warmup_steps=4) for step in range(6)]
    assert [rise[0] for rise in rises] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert all(rise[0] == rise[1] == rise[2] for rise in rises)


def test_both_warm_ups_multiply() -> None:
    assert factors(2, step=1, warmup_rounds=2, warmup_steps=4) == [0.25, 0.5]


def test_no_round_is_without_learning() -> None:
    assert min(factors(1000, schedule="cosine")) > 0
