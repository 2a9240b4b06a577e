"""What all ranks of a run must have in common, checked instead of hoped for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsafe.peers import Peers

_NAMED = 5
_BLOCK = 2**22
_RELATIVE, _ABSOLUTE = 1e-3, 1e-5
"""How far rounding drives apart what is trained together: far less than a step does."""
_PRIME = 1_000_003


def check_agreement(world: Peers, settings: Mapping[str, Any]) -> None:
    """Refuse ranks that were started with different settings, or that read different data.

    Args:
        world: All ranks.
        settings: By name, what must be the same; compared by how it prints.

    Raises:
        ValueError: On every rank, with the settings that differ, the ranks and the values.
    """
    everyones = world.gather({name: repr(value) for name, value in settings.items()})
    first, differences = everyones[0], []
    for rank, others in enumerate(everyones):
        names = [name for name in {**first, **others} if first.get(name) != others.get(name)]
        differences += [
            f"{name} is {first.get(name, 'missing')} on rank 0 and {others.get(name, 'missing')} "
            f"on rank {rank}"
            for name in names
        ]
    if differences:
        more = len(differences) - _NAMED
        shown = "; ".join(differences[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(
            f"the ranks disagree: {shown}; start all of them with the same configuration, on the "
            "same data"
        )


def check_same_adapter(world: Peers, adapter: Tensor, *, round_: int) -> None:
    """Refuse to go on where ranks hold different global adapters; compares checksums.

    Args:
        world: All ranks.
        adapter: The new global adapter, flat float32, shape ``(num_params,)``.
        round_: Round, from 0.

    Raises:
        ValueError: On every rank, with those that differ from rank 0.
    """
    if world.size > 1:
        everyones = world.gather(_checksum(adapter))
        _refuse([rank for rank, each in enumerate(everyones) if each != everyones[0]], round_)


def agreed_adapter(world: Peers, adapter: Tensor, *, round_: int) -> Tensor:
    """The first rank's adapter, where all have trained it together.

    Groups of ranks that clip gradients each by a norm of their own may differ by rounding.

    Args:
        world: All ranks.
        adapter: As this rank has trained it, flat float32, shape ``(num_params,)``.
        round_: Round, from 0.

    Raises:
        ValueError: On every rank, with those that differ from rank 0 by more.
    """
    if world.size == 1:
        return adapter
    first = world.broadcast_(adapter.clone(), source=0)
    is_close = torch.allclose(adapter, first, rtol=_RELATIVE, atol=_ABSOLUTE)
    _refuse([rank for rank, each in enumerate(world.gather(is_close)) if not each], round_)
    return first


def _refuse(others: list[int], round_: int) -> None:
    if others:
        named = ", ".join(map(str, others))
        raise ValueError(
            f"after round {round_ + 1} rank {named} holds another global adapter than rank 0; the "
            "ranks have drifted apart, check their hardware and libraries, and resume"
        )


def _checksum(vector: Tensor) -> int:
    """Of all bits and their places; some megabytes at a time."""
    checksum = 0
    for block in vector.view(torch.int32).split(_BLOCK):
        places = torch.arange(1, len(block) + 1, device=vector.device)
        checksum = (checksum * _PRIME + int((block * places).sum())) % 2**61
    return checksum
