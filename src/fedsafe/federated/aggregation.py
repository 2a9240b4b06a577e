"""How the clients' adapters become one: pure tensor rules, streamed.

References:
    McMahan et al. (2017), Algorithm 1. https://arxiv.org/abs/1602.05629
    Charikar, Chen and Farach-Colton (2002), Finding Frequent Items in Data Streams (the count
    sketch).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsafe.peers import Peers

SKETCH_WIDTH = 4096


class RefusedUpdateError(ValueError):
    """A client's update that must not enter the mean; the message says why."""


class WeightedMean:
    """Streaming ``sum_k n_k w_k / sum_k n_k``: one running sum, never all clients' copies.

    LoRA's A and B are averaged apart; ``mean(B) @ mean(A)`` is not ``mean(B @ A)``. The sum is in
    float64, so that the order of the clients, or who adds up whom, all but never shows in the
    float32 mean.

    Args:
        like: A flat float32 adapter; gives the shape and the device.
    """

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like, dtype=dtype_of_sums(like.device))
        self.weight = 0.0
        self.count = 0

    def add(self, adapter: Tensor, *, weight: float) -> None:
        """Take one client's adapter in.

        Args:
            adapter: Flat float32 vector, shape ``(num_params,)``.
            weight: Number of samples (or tokens) that the client has, > 0.

        Raises:
            RefusedUpdateError: If the shape differs or a value is not finite; the mean is then
                unchanged.
            ValueError: If the weight is not positive.
        """
        if not weight > 0:
            raise ValueError(f"weight is {weight}; a client's weight must be above 0")
        if adapter.shape != self.total.shape:
            raise RefusedUpdateError(
                f"the adapter has shape {tuple(adapter.shape)}, "
                f"the global one {tuple(self.total.shape)}"
            )
        if not bool(torch.isfinite(adapter).all()):
            num_bad = int((~torch.isfinite(adapter)).sum())
            raise RefusedUpdateError(f"{num_bad} of {adapter.numel()} values are not finite")
        self.total.add_(adapter, alpha=weight)
        self.weight += weight
        self.count += 1

    def pool(self, peers: Peers, weights: Sequence[float]) -> None:
        """Add up the peers' sums, so that each has the mean of all clients.

        Args:
            peers: Who adds up; all must call.
            weights: Weights of the clients that any of them took in, in the order of the round.
        """
        peers.sum_(self.total)
        self.weight = sum(weights, start=0.0)
        self.count = len(weights)

    def mean(self) -> Tensor:
        """The weighted mean so far, a new tensor.

        Raises:
            ValueError: If no client was added.
        """
        if self.count == 0:
            raise ValueError(
                "there is no update to average; every client of the round failed or was refused"
            )
        return (self.total / self.weight).float()

    def state_dict(self) -> dict[str, Tensor | float | int]:
        """Running sum and weights, for a checkpoint inside a round."""
        return {"total": self.total, "weight": self.weight, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor | float | int]) -> None:
        """Restore what `state_dict` returned."""
        total = state["total"]
        assert isinstance(total, Tensor)
        self.total.copy_(total)
        self.weight, self.count = float(state["weight"]), int(state["count"])


def dtype_of_sums(device: torch.device) -> torch.dtype:
    """Type in which clients are added up: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def sketch(update: Tensor, signs: Tensor) -> Tensor:
    """Count sketch of an update: angles between clients without keeping their updates.

    Inner products of two sketches estimate those of the updates with a standard error of about
    ``|u| |v| / sqrt(SKETCH_WIDTH)`` (1.6 %); up to `SKETCH_WIDTH` parameters they are exact.

    Args:
        update: Flat vector, shape ``(num_params,)``.
        signs: Random signs from `sketch_signs`, same shape.

    Returns:
        Shape ``(SKETCH_WIDTH,)``, float32.
    """
    signed = update * signs
    padding = -signed.numel() % SKETCH_WIDTH
    return torch.nn.functional.pad(signed, (0, padding)).view(-1, SKETCH_WIDTH).sum(0)


def sketch_signs(like: Tensor) -> Tensor:
    """Fixed random signs for `sketch`, int8, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return (bits * 2 - 1).to(like.device)


def cosines_to_mean(sketches: Tensor, weights: Tensor) -> Tensor:
    """Cosine of each client's update to the weighted mean of all of them.

    Args:
        sketches: One row a client, shape ``(num_clients, SKETCH_WIDTH)``.
        weights: Shape ``(num_clients,)``, > 0.

    Returns:
        Shape ``(num_clients,)``; 0 where an update is zero.
    """
    mean = (weights / weights.sum()) @ sketches
    return torch.nn.functional.cosine_similarity(sketches, mean[None], dim=1)
