"""Which of a round's visits, and which part of a step, falls to which rank: pure functions."""

from collections.abc import Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """What falls to one rank where several work on a round.

    Groups of ranks train different clients at once; the ranks of a group train on different parts
    of each step's samples.
    """

    group: int = 0
    """Number of the rank's group, from 0."""
    num_groups: int = 1
    rank: int = 0
    """Number of the rank in its group, from 0."""
    num_ranks: int = 1
    """Ranks of a group."""


WHOLE = Share()
"""What falls to the only rank there is."""


def balanced(costs: Sequence[float], num_groups: int) -> list[int]:
    """The group of each visit: the dearest first, each to the group with the least so far.

    Args:
        costs: What each visit costs, such as the tokens that it trains on.
        num_groups: Number of groups.

    Returns:
        As many numbers of groups as costs; the most loaded group has at most 4/3 of what the best
        assignment gives it.

    References:
        Graham (1969), Bounds on Multiprocessing Timing Anomalies, Theorem 2.
    """
    owners = [0] * len(costs)
    loads = [0.0] * num_groups
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        group = loads.index(min(loads))
        owners[place] = group
        loads[group] += costs[place]
    return owners
