"""The server of a federation: the global adapter, and how a round's updates change it.

Knows nothing of models, data or Lightning; updates come in one by one and are not kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedsafe.federated.aggregation import (
    RefusedUpdateError,
    WeightedMean,
    cosines_to_mean,
    sketch,
    sketch_signs,
)
from fedsafe.federated.client_drift import ClientDrift, Correction
from fedsafe.federated.server_optimizer import ServerOptimizer
from fedsafe.peers import ALONE, Peers

NotAccepted = Literal["failed", "late", "refused"]
"""What became of a visit whose update is not in the mean."""


class Update(NamedTuple):
    """What a client gives back after a visit."""

    adapter: Tensor
    """Its trained adapter, flat float32, shape ``(num_params,)``."""
    loss: float
    """Mean loss over the answer tokens trained on, nats; before each step."""
    num_steps: int
    num_tokens: int
    """Answer tokens trained on."""


class _Part(NamedTuple):
    """What one rank tells the others of its clients, beside the sum of their updates."""

    records: dict[int, dict[str, Any]]
    sketches: dict[int, Tensor]
    """Of the clients whose updates were accepted; on the CPU."""
    bytes_up: int
    bytes_down: int


class Server:
    """Holds the global adapter and aggregates one round at a time.

    Args:
        start: Initial adapter, flat float32, shape ``(num_params,)``.
        optimizer: What to do with the clients' mean.
        drift: Correction against client drift, or None.
        isolated: Never average: each client goes on from its own adapter (the baseline `local`).
        bytes_per_value: How adapters travel: 4 as float32, 2 as bfloat16.
    """

    def __init__(
        self,
        start: Tensor,
        *,
        optimizer: ServerOptimizer,
        drift: ClientDrift | None,
        isolated: bool = False,
        bytes_per_value: int = 4,
    ) -> None:
        self.adapter = start
        self.own_adapters: dict[int, Tensor] = {}
        self.isolated = isolated
        self._optimizer = optimizer
        self._drift = drift
        self._bytes_per_value = bytes_per_value
        optimizer.load_state_dict({})  # an earlier run may have left some
        if drift:
            drift.load_state_dict({})
        self._signs = sketch_signs(start)
        self._records: list[dict[str, Any]] = []
        self._sketches: list[Tensor] = []
        self._begin_round()

    def start_of(self, client: int) -> Tensor:
        """The adapter that a client starts from."""
        return self.own_adapters.get(client, self.adapter) if self.isolated else self.adapter

    def correction_for(self, client: int) -> Correction | None:
        """The correction of one visit's gradients, or None."""
        return self._drift.correction(client, self.start_of(client)) if self._drift else None

    def receive(
        self,
        client: int,
        update: Update,
        *,
        name: str,
        weight: float,
        num_samples: int,
        correction: Correction | None = None,
        seconds: float | None = None,
    ) -> None:
        """Take one client's update into the mean, or refuse it and say why in the record.

        Args:
            client: Number of the client.
            update: What it trained.
            name: Name of the client, for the record.
            weight: Its weight in the mean, > 0.
            num_samples: Samples that it holds, for the record.
            correction: The visit's correction, with what it learnt.
            seconds: Time that it took on a machine of its own, for the record.
        """
        record = {
            "client": name,
            "status": "ok",
            "samples": num_samples,
            "weight": weight,
            "steps": update.num_steps,
            "tokens": update.num_tokens,
            "loss": update.loss,
            **({} if seconds is None else {"seconds": seconds}),
        }
        self._records.append(record)
        self.count_bytes(up=self.bytes_of_visit, down=self.bytes_of_visit)
        try:
            if correction is not None:
                correction.check()
            self._mean.add(update.adapter, weight=weight)
        except RefusedUpdateError as error:
            record.update(status="refused", reason=str(error))
            return
        change = update.adapter - self.start_of(client)
        record["update_norm"] = change.norm().item()
        self._sketches.append(sketch(change, self._signs))
        if self.isolated:
            self.own_adapters[client] = update.adapter
        if self._drift and correction is not None:
            self._drift.collect(client, correction)

    def pool(
        self,
        peers: Peers,
        received: Sequence[int],
        owners: Mapping[int, int],
        *,
        group: Peers = ALONE,
    ) -> None:
        """Make the round that of all peers' clients; afterwards all peers' servers are alike.

        Call once a round, before failures are noted and the round is closed; all must call.

        Args:
            peers: The ranks whose clients trained at the same time.
            received: The clients that this server received, in the order in which it did.
            owners: Which of the peers received each client, in the order of the round's visits.
            group: The ranks that train a client together. Each adds up with peers of its own, and
                sums of other messages may differ in a last bit: they take the first one's.
        """
        assert not self.isolated, "clients that go on alone have no sum; exchange their updates"
        parts = peers.gather(self._part(received))
        records = {client: each for part in parts for client, each in part.records.items()}
        sketches = {client: each for part in parts for client, each in part.sketches.items()}
        assert records.keys() == owners.keys(), "a client was trained by another rank than planned"
        accepted = {client: owner for client, owner in owners.items() if client in sketches}
        self._mean.pool(peers, [records[client]["weight"] for client in accepted])
        group.broadcast_(self._mean.total, source=0)
        if self._drift:
            self._drift.pool(peers, accepted, like=self.adapter, group=group)
        self._records = [records[client] for client in owners]
        self._sketches = [sketches[client].to(self.adapter.device) for client in accepted]
        self._bytes_up = sum(part.bytes_up for part in parts)
        self._bytes_down = sum(part.bytes_down for part in parts)

    def _part(self, received: Sequence[int]) -> "_Part":
        records = dict(zip(received, self._records, strict=True))
        accepted = [client for client, record in records.items() if record["status"] == "ok"]
        sketches = dict(zip(accepted, [s.cpu() for s in self._sketches], strict=True))
        return _Part(records, sketches, self._bytes_up, self._bytes_down)

    def note_failure(
        self,
        name: str,
        status: NotAccepted = "failed",
        *,
        reason: str | None = None,
        was_sent: bool = True,
    ) -> None:
        """Record a client that gave nothing back that counts.

        Args:
            name: Name of the client.
            status: What became of its visit.
            reason: Why; None where there is none but chance.
            was_sent: Whether it got the global adapter.
        """
        why = {} if reason is None else {"reason": reason}
        self._records.append({"client": name, "status": status, **why})
        self.count_bytes(down=self.bytes_of_visit if was_sent else 0)

    @property
    def bytes_of_visit(self) -> int:
        """What travels to a client, and as much back."""
        vectors = self._drift.vectors_on_the_wire if self._drift else 1
        return vectors * self.adapter.numel() * self._bytes_per_value

    def count_bytes(self, *, up: int = 0, down: int = 0) -> None:
        """Add what travelled to the round's bytes."""
        self._bytes_up += up
        self._bytes_down += down

    def close_round(self, *, num_clients: int) -> dict[str, Any]:
        """Form the next global adapter.

        Args:
            num_clients: Clients of the federation, sampled or not.

        Returns:
            The round's record: clients, mean loss, norms, bytes.

        Raises:
            ValueError: If no update was accepted; the message names each client and its reason.
        """
        if self._mean.count == 0:
            reasons = "; ".join(
                f"{r['client']}: {r.get('reason', 'failed')}" for r in self._records
            )
            raise ValueError(f"the round has no update to average ({reasons}); nothing was changed")
        before = self.adapter
        if not self.isolated:
            self.adapter = self._optimizer.step(before, self._mean.mean())
        if self._drift:
            self._drift.end_round(num_clients)
        record = self._round_record(self.adapter - before)
        self._begin_round()
        return record

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint must hold, also inside a round."""
        return {
            "adapter": self.adapter,
            "own_adapters": self.own_adapters,
            "optimizer": self._optimizer.state_dict(),
            "drift": self._drift.state_dict() if self._drift else {},
            "mean": self._mean.state_dict(),
            "records": self._records,
            "sketches": self._sketches,
            "bytes": [self._bytes_up, self._bytes_down],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        device = self.adapter.device
        self.adapter = state["adapter"].to(device)
        self.own_adapters = {k: v.to(device) for k, v in state["own_adapters"].items()}
        self._optimizer.load_state_dict(state["optimizer"])
        if self._drift:
            self._drift.load_state_dict(state["drift"])
        self._begin_round()
        self._mean.load_state_dict(state["mean"])
        self._records = list(state["records"])
        self._sketches = [s.to(device) for s in state["sketches"]]
        self._bytes_up, self._bytes_down = state["bytes"]

    def _begin_round(self) -> None:
        self._mean = WeightedMean(self.adapter)
        self._records = []
        self._sketches = []
        self._bytes_up = self._bytes_down = 0

    def _round_record(self, change: Tensor) -> dict[str, Any]:
        accepted = [record for record in self._records if record["status"] == "ok"]
        weights = torch.tensor([r["weight"] for r in accepted], device=change.device)
        cosines = cosines_to_mean(torch.stack(self._sketches), weights).tolist()
        for record, cosine in zip(accepted, cosines, strict=True):
            record["cosine_to_mean"] = cosine
        num_tokens = sum(r["tokens"] for r in accepted)
        return {
            "clients": self._records,
            "loss": sum(r["loss"] * r["tokens"] for r in accepted) / max(1, num_tokens),
            "tokens": num_tokens,
            "update_norm": change.norm().item(),
            "adapter_norm": self.adapter.norm().item(),
            "bytes_up": self._bytes_up,
            "bytes_down": self._bytes_down,
        }
