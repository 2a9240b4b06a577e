"""Corrections of a client's gradients against drift from the global adapter: FedProx and SCAFFOLD.

References:
    Li et al. (2020), Federated Optimization in Heterogeneous Networks (FedProx), Algorithm 2.
    https://arxiv.org/abs/1812.06127
    Karimireddy et al. (2020), SCAFFOLD, Algorithm 1. https://arxiv.org/abs/1910.06378
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsafe.federated.aggregation import RefusedUpdateError, dtype_of_sums
from fedsafe.model.flat_adapter import FlatAdapter
from fedsafe.peers import ALONE, Peers


class Correction(ABC):
    """What one visit adds to its gradients, step by step."""

    learns: tuple[str, ...] = ()
    """Names of what `learnt` gives."""

    @abstractmethod
    def apply(self, adapter: FlatAdapter) -> None:
        """Change the adapter's gradients in place, before the optimizer steps."""

    def check(self) -> None:  # noqa: B027
        """Refuse what the visit learnt where it would spoil the rounds to come.

        Raises:
            RefusedUpdateError: If it is not finite.
        """

    def state_dict(self) -> dict[str, Tensor | int]:
        """What a checkpoint inside the visit must hold."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:  # noqa: B027
        """Restore what `state_dict` returned."""

    def sent(self) -> dict[str, Tensor]:
        """What a client on another machine needs beside the adapter: flat vectors, by name."""
        return {}

    def learnt(self) -> dict[str, Tensor]:
        """What that client gives back beside its adapter: flat vectors, by name."""
        return {}

    def take(self, learnt: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Know what the client's own correction has learnt."""


class ClientDrift(ABC):
    """A correction against client drift, with whatever it remembers between rounds."""

    vectors_on_the_wire: int = 1
    """Vectors of adapter size that travel each way in a visit."""

    @abstractmethod
    def correction(self, client: int, start: Tensor) -> Correction:
        """The correction for one visit.

        Args:
            client: Number of the client.
            start: Global adapter that the visit starts from, flat float32, shape ``(num_params,)``.
        """

    def remote_correction(self, start: Tensor, sent: Mapping[str, Tensor]) -> Correction:
        """The correction on the client's machine, which remembers nothing between rounds.

        Args:
            start: Global adapter that the visit starts from, flat float32, shape ``(num_params,)``.
            sent: What `Correction.sent` gave at the server.
        """
        return self.correction(0, start)

    def collect(self, client: int, correction: Correction) -> None:  # noqa: B027
        """Take back what the visit learnt; called only when its update was accepted."""

    def pool(  # noqa: B027
        self, peers: Peers, owners: Mapping[int, int], *, like: Tensor, group: Peers = ALONE
    ) -> None:
        """Make every peer know what any of them collected in the round; all must call.

        Args:
            peers: The ranks whose clients trained at the same time.
            owners: Which of the peers collected each client, in the order of the round.
            like: A flat float32 adapter; gives the shape and the device.
            group: The ranks that train a client together, which take the first one's sums.
        """

    def end_round(self, num_clients: int) -> None:  # noqa: B027
        """Update the server's side, once a round.

        Args:
            num_clients: Clients of the federation, sampled or not.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, by name."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Restore what `state_dict` returned."""


class _Proximal(Correction):
    def __init__(self, start: Tensor, mu: float) -> None:
        self.start = start
        self.mu = mu

    def apply(self, adapter: FlatAdapter) -> None:
        gradient = adapter.read_gradient()
        adapter.write_gradient(gradient.add_(adapter.read() - self.start, alpha=self.mu))


class FedProx(ClientDrift):
    """Adds ``mu / 2 * |w - x_t|^2`` to the local loss (Li et al. 2020).

    That is ``mu * (w - x_t)`` in the gradient.

    Args:
        mu: Strength of the pull towards the global adapter, >= 0; 0 is FedAvg.
    """

    def __init__(self, mu: float = 0.01) -> None:
        if not mu >= 0:
            raise ValueError(f"mu of FedProx is {mu}; give 0 or more")
        self.mu = mu

    def correction(self, client: int, start: Tensor) -> Correction:
        """See the class."""
        return _Proximal(start, self.mu)


class _ControlVariates(Correction):
    """Adds ``c - c_i`` to every gradient and averages the raw ones."""

    learns = ("mean_gradient",)

    def __init__(self, shift: Tensor) -> None:
        self.shift = shift
        self.gradient_sum = torch.zeros_like(shift)
        self.num_steps = 0

    def apply(self, adapter: FlatAdapter) -> None:
        gradient = adapter.read_gradient()
        self.gradient_sum += gradient
        adapter.write_gradient(gradient.add_(self.shift))
        self.num_steps += 1

    def check(self) -> None:
        num_bad = int((~torch.isfinite(self.mean_gradient())).sum())
        if num_bad:
            raise RefusedUpdateError(
                f"{num_bad} of {self.gradient_sum.numel()} values of the control variate are not "
                "finite"
            )

    def mean_gradient(self) -> Tensor:
        assert self.num_steps > 0, "a visit ends with an optimizer step"
        return self.gradient_sum / self.num_steps

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"gradient_sum": self.gradient_sum, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.gradient_sum.copy_(torch.as_tensor(state["gradient_sum"]))
        self.num_steps = int(state["num_steps"])

    def sent(self) -> dict[str, Tensor]:
        return {"shift": self.shift}

    def learnt(self) -> dict[str, Tensor]:
        return {"mean_gradient": self.mean_gradient()}

    def take(self, learnt: Mapping[str, Tensor]) -> None:
        self.load_state_dict({"gradient_sum": learnt["mean_gradient"], "num_steps": 1})


class Scaffold(ClientDrift):
    """Control variates: local gradients become ``g + c - c_i`` (Karimireddy et al. 2020).

    The client's new control variate is the mean of its raw gradients over the visit. Under plain
    SGD that equals the paper's option II, ``c_i - c + (x - y_i) / (K * lr)``, to rounding; under
    AdamW, whose steps are no gradients, it alone stays in the units of a gradient. The server moves
    by ``c += 1/N * sum_i (c_i_new - c_i)`` over the round's clients.
    """

    vectors_on_the_wire = 2

    def __init__(self) -> None:
        self.server_control: Tensor | None = None
        self.client_controls: dict[int, Tensor] = {}
        self._change: Tensor | None = None

    def correction(self, client: int, start: Tensor) -> Correction:
        """See the class; controls are zero until a client's first visit ends."""
        zero = torch.zeros_like(start)
        server = zero if self.server_control is None else self.server_control.to(start.device)
        control = self.client_controls.get(client)
        return _ControlVariates(server - (zero if control is None else control.to(start.device)))

    def remote_correction(self, start: Tensor, sent: Mapping[str, Tensor]) -> Correction:
        """See the class; the server keeps the client's control variate and sends ``c - c_i``."""
        return _ControlVariates(sent["shift"].to(start.device))

    def collect(self, client: int, correction: Correction) -> None:
        """Keep the client's new control variate; add its change to the server's sum."""
        assert isinstance(correction, _ControlVariates)
        new = correction.mean_gradient()
        old = self.client_controls.get(client)
        change = new if old is None else new - old.to(new.device)
        so_far = _zero_sum(new) if self._change is None else self._change.to(new.device)
        self._change = so_far + change
        self.client_controls[client] = new

    def pool(
        self, peers: Peers, owners: Mapping[int, int], *, like: Tensor, group: Peers = ALONE
    ) -> None:
        """Add up the peers' changes; hand each client's control variate on, whoever trains it next.

        See the class above.
        """
        for client, owner in owners.items():
            own = owner == peers.index
            control = self.client_controls[client] if own else torch.empty_like(like)
            self.client_controls[client] = peers.broadcast_(control, source=owner)
        if owners:
            change = _zero_sum(like) if self._change is None else self._change
            self._change = group.broadcast_(peers.sum_(change), source=0)

    def end_round(self, num_clients: int) -> None:
        """Move the server's control variate by the mean change over all clients."""
        if self._change is None:
            return
        step = (self._change / num_clients).float()
        self.server_control = (
            step if self.server_control is None else self.server_control.to(step.device) + step
        )
        self._change = None

    def state_dict(self) -> dict[str, Tensor]:
        """Both sides' control variates and the sum of the round so far."""
        state = {f"client.{client}": control for client, control in self.client_controls.items()}
        if self.server_control is not None:
            state["server"] = self.server_control
        if self._change is not None:
            state["change"] = self._change
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.server_control = state.get("server")
        self._change = state.get("change")
        names: Sequence[str] = [name for name in state if name.startswith("client.")]
        self.client_controls = {int(name.removeprefix("client.")): state[name] for name in names}


def _zero_sum(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=dtype_of_sums(like.device))
