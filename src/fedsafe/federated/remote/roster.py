"""`Roster`: which client has which number, and which node is its own; kept on disk.

Numbers decide random draws, so they stay, whoever comes and goes and however often the server is
started again.
"""

import json
import uuid
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fedsafe.data.output_files import write_whole
from fedsafe.federated.partition import Partition

FILE = "roster.json"


@dataclass
class Member:
    """A client of the federation."""

    name: str
    node: int | None = None
    """The node that it was last seen at; None before it ever came."""
    num_samples: int = 0
    """Samples that it trains on, as it last said."""
    num_answer_tokens: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    """What its filter did, in numbers; empty without one."""


class Roster:
    """The clients by number, from 0.

    Args:
        file: Where it is kept.
        run: Name of the run, random; None makes one.
        members: The clients so far, in the order of their numbers.
    """

    def __init__(
        self, file: Path, *, run: str | None = None, members: Sequence[Member] = ()
    ) -> None:
        self.file = file
        self.run = run if run is not None else uuid.uuid4().hex
        self.members = list(members)

    @staticmethod
    def read(file: Path) -> "Roster":
        """The roster of a run that goes on.

        Raises:
            ValueError: If it is missing or not as it was written.
        """
        try:
            saved = json.loads(file.read_text())
            members = [Member(**each) for each in saved["clients"]]
            return Roster(file, run=saved["run"], members=members)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}, which holds the numbers of the clients, cannot be read "
                f"({type(error).__name__}); restore it, or start a new run in another directory"
            ) from error

    def write(self) -> None:
        """Write it down, whole or not at all."""
        saved = {"run": self.run, "clients": [asdict(member) for member in self.members]}
        write_whole(self.file, [json.dumps(saved, ensure_ascii=False, indent=1) + "\n"])

    def number_of(self, name: str) -> int | None:
        """Number of a client; None if it has none yet."""
        return next((k for k, member in enumerate(self.members) if member.name == name), None)

    def add(self, name: str) -> int:
        """Give a client the next number, if it has none yet."""
        number = self.number_of(name)
        if number is None:
            number = len(self.members)
            self.members.append(Member(name))
        return number

    def partition(self, present: Container[int] | None = None) -> Partition:
        """How many samples each client holds; which ones is nobody's business here.

        Args:
            present: Numbers of the clients that are there; the others count as holding none. None
                counts all.
        """
        sizes = [
            member.num_samples if present is None or number in present else 0
            for number, member in enumerate(self.members)
        ]
        offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        # one zero seen from everywhere: a number that a node sends must not allocate memory
        order = np.broadcast_to(np.zeros(1, dtype=np.int64), (int(offsets[-1]),))
        return Partition(order, offsets, tuple(member.name for member in self.members))
