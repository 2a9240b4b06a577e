"""`FlowerPost`: Flower carries the letters between the server and its nodes."""

import time
from collections.abc import Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Thread

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedsafe.federated.flower.records import from_records, to_records
from fedsafe.federated.remote.letter import Letter
from fedsafe.federated.remote.post import Delivery, Post

MESSAGE_TYPE = "train"
"""Flower's name of what a node is asked; the letter itself says what it is."""

_PAUSE_SECONDS = 0.01
"""For each letter that is under way: how long to wait before asking for an answer again."""
_MIN_PAUSE_SECONDS = 0.2


class FlowerPost(Post):
    """Over the grid that Flower gives a ServerApp.

    Flower's own call for answers waits, for minutes, while one node is still sending, or died as it
    sent; so each answer is fetched in a thread of its own.

    Args:
        grid: The ServerApp's.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._nodes: dict[int, NodeInfo] = {}
        self._open: dict[str, int] = {}
        self._asked: dict[str, float] = {}
        self._fetched: SimpleQueue[tuple[str, list[Delivery]]] = SimpleQueue()
        self._ready: dict[str, Delivery] = {}

    def nodes(self) -> list[int]:
        """See `Post.nodes`; a node that missed two heartbeats is not there."""
        there = {node.node_id: node for node in self._grid.get_nodes()}
        self._nodes |= there
        return sorted(there)

    def here_since(self, node: int) -> str | None:
        """See `Post.here_since`."""
        return self._nodes[node].last_activated_at if node in self._nodes else None

    def vouched_name(self, node: int) -> str | None:
        """See `Post.vouched_name`: the name that the node's key was registered with."""
        return (self._nodes[node].name or None) if node in self._nodes else None

    def send(self, letters: Mapping[int, Letter], *, expires_seconds: float) -> dict[int, str]:
        """See `Post.send`."""
        tickets = {}
        for node, letter in letters.items():  # one by one: each holds a whole adapter
            message = Message(to_records(letter), node, MESSAGE_TYPE, ttl=expires_seconds)
            for ticket in self._grid.push_messages([message]):
                if ticket:  # Flower gives None for a node that is gone
                    tickets[node] = ticket
                    self._open[ticket] = node
        return tickets

    def collect(self, tickets: Sequence[str]) -> list[Delivery]:
        """See `Post.collect`."""
        waiting = [ticket for ticket in tickets if ticket in self._open]
        self._fetch(waiting)
        self._take_fetched()
        return [self._ready.pop(ticket) for ticket in tickets if ticket in self._ready]

    def forget(self, tickets: Sequence[str]) -> None:
        """See `Post.forget`; an answer that is being fetched is dropped when it is there."""
        for ticket in tickets:
            for each in (self._open, self._asked, self._ready):
                each.pop(ticket, None)

    def _fetch(self, tickets: Sequence[str]) -> None:
        """Ask for the answers, but for those asked for a moment ago or still being fetched."""
        now = time.monotonic()
        pause = max(_MIN_PAUSE_SECONDS, _PAUSE_SECONDS * len(tickets))
        for ticket in tickets:
            if now - self._asked.get(ticket, 0.0) < pause:
                continue
            self._asked[ticket] = float("inf")
            node = self._open[ticket]
            Thread(target=self._fetch_one, args=(ticket, node), daemon=True).start()

    def _fetch_one(self, ticket: str, node: int) -> None:
        try:
            found = [_delivery(each, ticket, node) for each in self._grid.pull_messages([ticket])]
        except Exception as error:  # noqa: BLE001 - Flower's, and those of what it is made of
            found = [Delivery(ticket, node, None, f"Flower failed with {type(error).__name__}")]
        self._fetched.put((ticket, found))

    def _take_fetched(self) -> None:
        while True:
            try:
                ticket, found = self._fetched.get_nowait()
            except Empty:
                return
            if ticket not in self._open:
                continue
            self._asked[ticket] = time.monotonic()
            if found:
                self._ready[ticket] = found[0]
                del self._open[ticket], self._asked[ticket]


def _delivery(message: Message, ticket: str, node: int) -> Delivery:
    """What a message of Flower's says."""
    if message.has_error():
        return Delivery(ticket, node, None, _one_line(message.error.reason))
    sender = message.metadata.src_node_id
    if sender != node:
        return Delivery(ticket, sender, None, f"node {sender} answered in the place of {node}")
    try:
        return Delivery(ticket, node, from_records(message.content))
    except ValueError as error:
        return Delivery(ticket, node, None, str(error))


def _one_line(reason: str | None) -> str:
    """The first sentence of what Flower says."""
    line = (reason or "Flower gave no reason").strip().splitlines()[0]
    return line.removeprefix("Error: ").split(". ")[0].rstrip(".")
