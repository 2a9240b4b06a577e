"""The learning rate over rounds and inside a visit: a pure function, nothing to resume."""

import math
from typing import Literal

LearningRateSchedule = Literal["constant", "cosine"]


def learning_rate_factor(
    *,
    round_: int,
    num_rounds: int,
    step: int,
    schedule: LearningRateSchedule,
    floor: float,
    warmup_rounds: int,
    warmup_steps: int,
) -> float:
    """Factor on the peak learning rate.

    Constant within a visit but for its warm-up; over rounds constant, or
    ``floor + (1 - floor) * (1 + cos(pi * round / num_rounds)) / 2``.

    Args:
        round_: Round, from 0.
        num_rounds: Rounds of the run.
        step: Optimizer step inside the visit, from 0.
        schedule: Shape over rounds.
        floor: Share of the peak that cosine decays to, 0 to 1.
        warmup_rounds: Rounds of linear warm-up at the start of the run.
        warmup_steps: Steps of linear warm-up at the start of each visit, whose optimizer is fresh.

    Returns:
        A number in (0, 1].
    """
    factor = 1.0
    if schedule == "cosine":
        factor = floor + (1 - floor) * (1 + math.cos(math.pi * round_ / num_rounds)) / 2
    if round_ < warmup_rounds:
        factor *= (round_ + 1) / warmup_rounds
    if step < warmup_steps:
        factor *= (step + 1) / warmup_steps
    return factor


def check_schedule(
    learning_rate: float, *, lr_floor: float, warmup_rounds: int, warmup_steps: int
) -> None:
    """Refuse settings that are out of range.

    Raises:
        ValueError: Names the setting and its value.
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}; give a number above 0")
    if not 0 <= lr_floor <= 1:
        raise ValueError(f"lr_floor is {lr_floor}; give a share of the peak, 0 to 1")
    for name, value in (("warmup_rounds", warmup_rounds), ("warmup_steps", warmup_steps)):
        if value < 0:
            raise ValueError(f"{name} is {value}; give 0 for none, or more")
