"""`Fleet`: how a server deals with clients that may be slow, absent or wrong."""

import math
from dataclasses import dataclass

from fedsafe.federated.remote.facts import Encoding
from fedsafe.federated.schedule import num_sampled


@dataclass(frozen=True)
class Fleet:
    """How many clients a round needs, and how long it waits for them.

    Args:
        min_clients: A round neither starts nor ends with fewer; with fewer updates the run ends.
            Where clients are sampled by a share, at least so many are.
        target_clients: A round ends as soon as so many updates were accepted; None waits for all
            that were asked.
        deadline_seconds: A round waits no longer than this for updates; who is late is left out.
        patience_seconds: How long to wait for `min_clients` to be there before the run ends.
        grace_seconds: How long a run that starts, or goes on, waits for clients beyond
            `min_clients`; also how long a client that was asked may be out of reach.
        encoding: How adapters travel, both ways: `bfloat16` halves the bytes, and rounds.
        clients: Names that may take part, in the order of their numbers, which decide their random
            draws; None takes anyone, numbered by name at the start and by arrival later.

    Raises:
        ValueError: If a number is out of range or a name is given twice.
    """

    min_clients: int = 2
    target_clients: int | None = None
    deadline_seconds: float = 3600.0
    patience_seconds: float = 600.0
    grace_seconds: float = 30.0
    encoding: Encoding = "float32"
    clients: list[str] | None = None

    def __post_init__(self) -> None:
        """Check what the user chose."""
        if self.min_clients < 1:
            raise ValueError(f"fleet.min_clients is {self.min_clients}; give 1 or more")
        if self.target_clients is not None and self.target_clients < self.min_clients:
            raise ValueError(
                f"fleet.target_clients is {self.target_clients}, fewer than fleet.min_clients, "
                f"{self.min_clients}; raise it, or leave it out"
            )
        for name in ("deadline_seconds", "patience_seconds", "grace_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"fleet.{name} is {value}; give a finite number of seconds from 0")
        if self.clients is not None:
            self._check_names(self.clients)

    def _check_names(self, names: list[str]) -> None:
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"fleet.clients names {', '.join(twice)} more than once")
        if len(names) < self.min_clients:
            raise ValueError(
                f"fleet.clients names {len(names)}, and fleet.min_clients is {self.min_clients}: "
                "no round would ever start; name more, or lower it"
            )

    @property
    def bytes_per_value(self) -> int:
        """Size of a value on the wire."""
        return 2 if self.encoding == "bfloat16" else 4

    def check_sampling(self, clients_per_round: float) -> None:
        """Refuse rounds that sample fewer clients than they need.

        Args:
            clients_per_round: A whole number, or a share up to 1.0.

        Raises:
            ValueError: If no round could end, or would end before its target.
        """
        if not isinstance(clients_per_round, int):
            num_sampled(clients_per_round, self.min_clients)  # refuses a share out of range
            return
        for name in ("min_clients", "target_clients"):
            value = getattr(self, name)
            if value is not None and value > clients_per_round:
                raise ValueError(
                    f"fleet.{name} is {value}, and a round samples {clients_per_round} "
                    "(federated.clients_per_round); lower the first or raise the second"
                )
