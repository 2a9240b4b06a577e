"""`Post`: carries letters between the server and the nodes; Flower is one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fedsafe.federated.remote.letter import Letter


class Delivery(NamedTuple):
    """What came back on one letter."""

    ticket: str
    """Of the letter that this answers."""
    node: int
    """Who answered, as the post knows it, whatever the letter itself claims."""
    letter: Letter | None
    """The answer; None where the node, or the post, failed."""
    problem: str = ""
    """Why there is no answer."""


class Post(ABC):
    """The server's end."""

    @abstractmethod
    def nodes(self) -> list[int]:
        """The nodes that can be reached now, as the post numbers them."""

    def here_since(self, node: int) -> str | None:
        """Changes when the node was gone and came back, however short that was; None: unknown."""
        return None

    def forget(self, tickets: Sequence[str]) -> None:  # noqa: B027
        """Nobody will ask for the answers on these tickets any more."""

    def vouched_name(self, node: int) -> str | None:
        """The only name that a node may have, by the key that it came with; None: any."""
        return None

    @abstractmethod
    def send(self, letters: Mapping[int, Letter], *, expires_seconds: float) -> dict[int, str]:
        """Hand over one letter a node; does not wait.

        Args:
            letters: By node.
            expires_seconds: How long an answer is of use.

        Returns:
            A ticket by node, for those whose letter was taken.
        """

    @abstractmethod
    def collect(self, tickets: Sequence[str]) -> list[Delivery]:
        """Answers that have come on any of these tickets, each once; does not wait."""
