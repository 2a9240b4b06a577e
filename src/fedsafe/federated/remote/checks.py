"""What a node says, held against what can be true; nothing is allocated for it before."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsafe.federated.aggregation import RefusedUpdateError
from fedsafe.federated.remote.facts import NodeFacts, VisitOrder, VisitReport

_MOST = 2**40
"""Samples, or tokens: far more than any client holds, far less than arithmetic can hold."""
_LONGEST_NAME = 64
_MOST_FILTER_COUNTS = 32
_HEADER_BYTES = 1024
"""What the header of a safetensors file takes for a tensor, with room to spare."""


def check_node(facts: NodeFacts, *, run: str, names: list[str] | None) -> None:
    """Refuse a node that cannot take part, whatever its settings are.

    Args:
        facts: What it says.
        run: Name of the run.
        names: Clients that may take part; None lets anyone.

    Raises:
        ValueError: Says why.
    """
    if facts.run != run:
        raise ValueError("it answers for another run")
    name = facts.client
    if not (name and len(name) <= _LONGEST_NAME and name.isprintable()):
        raise ValueError(
            f"its name has {len(name)} characters; give 1 to {_LONGEST_NAME} that can be printed"
        )
    if names is not None and name not in names:
        raise ValueError(f"{name} is not among fleet.clients")
    _check_count("num_samples", facts.num_samples)
    _check_count("num_answer_tokens", facts.num_answer_tokens)
    _check_filter_counts(facts.filtered)
    if facts.num_answer_tokens < facts.num_samples:
        raise ValueError(
            f"{name} holds {facts.num_samples} samples with {facts.num_answer_tokens} answer "
            "tokens, and each sample has one at least"
        )


def check_report(
    report: VisitReport,
    order: VisitOrder,
    *,
    num_steps: int,
    num_samples: int,
    num_answer_tokens: int,
) -> None:
    """Refuse a report that is not of this visit, or says what cannot be.

    Args:
        report: What came.
        order: What was asked.
        num_steps: Optimizer steps that a visit to the client has.
        num_samples: Samples that it said it holds.
        num_answer_tokens: Answer tokens of those.

    Raises:
        RefusedUpdateError: Says what is wrong.
    """
    for name in ("run", "ticket", "round", "client", "name"):
        given, asked = getattr(report, name), getattr(order, name)
        if given != asked:
            raise RefusedUpdateError(_of_another(name, given, asked))
    wanted = {
        "num_steps": num_steps,
        "num_samples": num_samples,
        "num_answer_tokens": num_answer_tokens,
    }
    for name, expected in wanted.items():
        given = getattr(report, name)
        if given != expected:
            raise RefusedUpdateError(f"{name} is {given}; expected {expected}")
    for name in ("num_tokens", "start_tokens"):
        _check_count(name, getattr(report, name))
    for name in ("loss", "seconds", "start_nll"):
        value = getattr(report, name)
        if not is_finite(value) or not 0 <= value < _MOST:  # sums of larger ones may be infinite
            raise RefusedUpdateError(
                f"{name} is {value}; expected a finite number from 0, below {_MOST:,}"
            )


def check_size(data: bytes, *, num_tensors: int, num_bytes: int) -> None:
    """Refuse a file of tensors that is too long, before anything of it is read.

    Args:
        data: What came.
        num_tensors: Tensors that it should hold.
        num_bytes: What their values take.

    Raises:
        RefusedUpdateError: Says how long it is.
    """
    limit = num_bytes + (num_tensors + 1) * _HEADER_BYTES
    if len(data) > limit:
        raise RefusedUpdateError(f"the tensors take {len(data):,} bytes; {limit:,} is the limit")


def check_values(vector: Tensor, *, what: str) -> None:
    """Refuse values that are not finite.

    Raises:
        RefusedUpdateError: Says how many.
    """
    num_bad = int((~torch.isfinite(vector)).sum())
    if num_bad:
        raise RefusedUpdateError(f"{num_bad} of {vector.numel()} values of {what} are not finite")


def is_finite(value: float) -> bool:
    """Whether a number of JSON is one to calculate with; a whole one may be too large."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _check_filter_counts(filtered: Mapping[str, object]) -> None:
    """Refuse what has no place in a roster: its names are written down as they came."""
    if len(filtered) > _MOST_FILTER_COUNTS:
        raise ValueError(
            f"its filter has {len(filtered)} counts; {_MOST_FILTER_COUNTS} is the limit"
        )
    for what, count in filtered.items():
        if len(what) > _LONGEST_NAME or not what.isprintable():
            raise ValueError(
                f"a count of its filter has a name of {len(what)} characters; give up to "
                f"{_LONGEST_NAME} that can be printed"
            )
        if not isinstance(count, int):
            raise ValueError(f"{what} of its filter is no whole number")
        _check_count(f"{what} of its filter", count)


def _check_count(name: str, value: int) -> None:
    if not 0 <= value < _MOST:
        raise RefusedUpdateError(f"{name} is {value}; expected 0 to {_MOST:,}")


def _of_another(name: str, given: Any, asked: Any) -> str:
    if name == "ticket":  # random: its value tells nobody anything
        return "the ticket is not that of the order"
    if name == "round":
        given, asked = given + 1, asked + 1
    return f"the update is of {name} {given}; expected {asked}"
