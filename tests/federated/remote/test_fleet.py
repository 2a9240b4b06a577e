"""Settings of a server that no federation could run under are refused."""

from typing import Any

import pytest

from fedsafe.federated.remote.fleet import Fleet


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"min_clients": 0}, r"fleet\.min_clients is 0; give 1 or more"),
        (
            {"min_clients": 3, "target_clients": 2},
            r"fleet\.target_clients is 2, fewer than fleet\.min_clients, 3; raise it, or leave",
        ),
        ({"deadline_seconds": -1.0}, r"fleet\.deadline_seconds is -1\.0; give a finite number"),
        ({"patience_seconds": float("inf")}, r"fleet\.patience_seconds is inf; give a finite"),
        ({"grace_seconds": float("nan")}, r"fleet\.grace_seconds is nan; give a finite number"),
        ({"clients": ["a", "b", "a"]}, r"fleet\.clients names a more than once"),
        (
            {"clients": ["a"]},
            r"fleet\.clients names 1, and fleet\.min_clients is 2: no round would",
        ),
    ],
    ids=["none", "target", "deadline", "patience", "grace", "twice", "too few"],
)
def test_a_setting_that_cannot_be_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Fleet(**settings)


@pytest.mark.parametrize(
    ("settings", "clients_per_round", "problem"),
    [
        ({"min_clients": 3}, 2, r"fleet\.min_clients is 3, and a round samples 2"),
        ({"target_clients": 5}, 4, r"fleet\.target_clients is 5, and a round samples 4"),
        ({}, 1.5, "clients_per_round is 1.5; give a whole number of clients, or a share"),
    ],
    ids=["minimum", "target", "share"],
)
def test_rounds_that_sample_too_few_are_refused(
    settings: dict[str, Any], clients_per_round: float, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        Fleet(**settings).check_sampling(clients_per_round)


def test_rounds_that_sample_enough_are_not() -> None:
    Fleet(min_clients=2, target_clients=3).check_sampling(3)
    Fleet(min_clients=2, target_clients=3).check_sampling(0.5)


def test_what_a_value_takes() -> None:
    assert Fleet().bytes_per_value == 4
    assert Fleet(encoding="bfloat16").bytes_per_value == 2
