"""What ranks that train different clients tell each other at the end of a round.

Two ways. `sums`: each rank streams its clients into a running sum, and the sums are added up;
memory does not grow with the clients, and the result is that of one process but for the rounding of
float64, which all but never shows in float32. `updates`: every rank takes in every client's update,
in the order of the round's visits, so that the arithmetic is that of one process, bit for bit; a
rank keeps the updates of its own clients until then.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fedsafe.federated.client_drift import Correction
from fedsafe.federated.server import Server, Update
from fedsafe.peers import ALONE, Peers

ExchangeMode = Literal["sums", "updates"]


class _Facts(NamedTuple):
    """A client's update without its tensors."""

    loss: float
    num_steps: int
    num_tokens: int
    name: str
    weight: float
    num_samples: int
    learnt: dict[str, int]
    """The numbers of what the visit's correction learnt."""


@dataclass(frozen=True)
class _Kept:
    facts: _Facts
    adapter: Tensor
    correction: Correction | None


class RoundExchange:
    """Takes in the updates of this rank's clients; once a round, makes all ranks' servers alike.

    Alone, it hands updates on and has nothing to settle.

    Args:
        server: This rank's server; all ranks' are alike when a round begins.
        peers: The ranks that train other clients at the same time, and this one.
        mode: `sums` or `updates`; a server that never averages needs every update on every rank,
            and gets `updates` in any case.
        group: The ranks that train a client together.

    Raises:
        ValueError: If the mode is another one.
    """

    def __init__(
        self, server: Server, peers: Peers, mode: ExchangeMode, *, group: Peers = ALONE
    ) -> None:
        if mode not in get_args(ExchangeMode):
            raise ValueError(f"exchange is {mode!r}; give 'sums' or 'updates'")
        self._server = server
        self._peers = peers
        self._group = group
        self._keeps = peers.size > 1 and (mode == "updates" or server.isolated)
        self._kept: dict[int, _Kept] = {}
        self._received: list[int] = []

    def receive(
        self,
        client: int,
        update: Update,
        *,
        name: str,
        weight: float,
        num_samples: int,
        correction: Correction | None = None,
    ) -> None:
        """Take one of this rank's own clients; the arguments are those of `Server.receive`."""
        if self._keeps:
            learnt = _numbers(correction) if correction is not None else {}
            facts = _Facts(*update[1:], name, weight, num_samples, learnt)
            self._kept[client] = _Kept(facts, update.adapter, correction)
            return
        self._received.append(client)
        self._server.receive(
            client,
            update,
            name=name,
            weight=weight,
            num_samples=num_samples,
            correction=correction,
        )

    def settle(self, owners: Mapping[int, int]) -> None:
        """Make every rank's server as if it had received all clients itself; all ranks call.

        Args:
            owners: Which of the peers trained each client that did not fail, in the order of the
                round's visits.
        """
        if self._keeps:
            self._receive_all(owners)
        elif self._peers.size > 1:
            self._server.pool(self._peers, self._received, owners, group=self._group)
        self._kept, self._received = {}, []

    def _receive_all(self, owners: Mapping[int, int]) -> None:
        own = {client: kept.facts for client, kept in self._kept.items()}
        facts = {client: each for part in self._peers.gather(own) for client, each in part.items()}
        assert facts.keys() == owners.keys(), "a client was trained by another rank than planned"
        for client, owner in owners.items():
            self._receive_from(owner, client, facts[client])

    def _receive_from(self, owner: int, client: int, facts: _Facts) -> None:
        """Take in a client's update, which its owner sends; the owner then lets go of it."""
        if owner == self._peers.index:
            kept = self._kept.pop(client)
            adapter, correction = kept.adapter, kept.correction
        else:
            adapter = torch.empty_like(self._server.adapter)
            correction = self._server.correction_for(client)
        self._peers.broadcast_(adapter, source=owner)
        if correction is not None:
            self._share(correction, facts.learnt, owner=owner)
        self._server.receive(
            client,
            Update(adapter, facts.loss, facts.num_steps, facts.num_tokens),
            name=facts.name,
            weight=facts.weight,
            num_samples=facts.num_samples,
            correction=correction,
        )

    def _share(self, correction: Correction, numbers: dict[str, int], *, owner: int) -> None:
        """Make the correction know what the owner's learnt."""
        state = correction.state_dict()
        for value in state.values():
            if isinstance(value, Tensor):
                self._peers.broadcast_(value, source=owner)
        correction.load_state_dict({**state, **numbers})


def _numbers(correction: Correction) -> dict[str, int]:
    state = correction.state_dict()
    return {name: value for name, value in state.items() if not isinstance(value, Tensor)}
