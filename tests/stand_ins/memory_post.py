"""A post whose nodes are in this process, and do what a test wants of them."""

from collections.abc import Callable, Mapping, Sequence

from fedsafe.federated.remote.letter import Letter
from fedsafe.federated.remote.post import Delivery, Post

Node = Callable[[Letter], Letter]
"""Answers a letter; raises to give no answer but a problem."""


class MemoryPost(Post):
    """Letters are answered as they are sent; the answers wait until they are collected.

    Attributes:
        members: The nodes by number; a test may add and remove them at any time.
        sent: Every letter that went out, with its node.
        since: Changes when a node came back.
        lost: Nodes that lose their next letter.
        vouched: The only name that a node may have.
        held_back: Nodes whose answers are kept until they are taken off this set.
    """

    def __init__(self, members: Mapping[int, Node]) -> None:
        self.members = dict(members)
        self.sent: list[tuple[int, Letter]] = []
        self.held_back: set[int] = set()
        self.vouched: dict[int, str] = {}
        self.since: dict[int, str] = {}
        self.lost: set[int] = set()
        self.on_send: Callable[[int, Letter], None] = lambda node, letter: None
        self._answers: list[Delivery] = []

    def nodes(self) -> list[int]:
        return list(self.members)

    def here_since(self, node: int) -> str | None:
        return self.since.get(node)

    def vouched_name(self, node: int) -> str | None:
        return self.vouched.get(node)

    def send(self, letters: Mapping[int, Letter], *, expires_seconds: float) -> dict[int, str]:
        tickets = {}
        for node, letter in letters.items():
            self.on_send(node, letter)
            if node not in self.members:
                continue
            self.sent.append((node, letter))
            tickets[node] = f"ticket {len(self.sent)}"
            if node in self.lost:
                self.lost.discard(node)
                continue
            self._answers += self.answers(tickets[node], node, letter)
        return tickets

    def answers(self, ticket: str, node: int, letter: Letter) -> list[Delivery]:
        """What comes back on a letter: bytes travel, as they would."""
        try:
            answer = self.members[node](Letter.from_bytes(letter.to_bytes()))
        except ConnectionError as error:
            return [Delivery(ticket, node, None, str(error))]
        return [Delivery(ticket, node, Letter.from_bytes(answer.to_bytes()))]

    def collect(self, tickets: Sequence[str]) -> list[Delivery]:
        ready = [a for a in self._answers if a.ticket in tickets and a.node not in self.held_back]
        self._answers = [answer for answer in self._answers if answer not in ready]
        return ready
