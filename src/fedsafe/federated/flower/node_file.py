"""`Node`: how a client's machine was set up, as its own directory keeps it.

Standard library only: the process that answers a message reads it first thing.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from fedsafe.federated.flower.private_line import write_private

NAME = "node.json"


@dataclass(frozen=True)
class Node:
    """One client on its own machine.

    Args:
        name: Name of the client.
        arguments: Options of `fedsafe fit`, `--config` among them.
        cwd: Folder that paths in them start from.
        idle_seconds: The resident trainer ends when it was not asked anything for so long.
        num_ranks: Processes that train the client together, one a GPU.
    """

    name: str
    arguments: list[str]
    cwd: str
    idle_seconds: float = 3600.0
    num_ranks: int = 1

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            ValueError: If the file is none.
        """
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{file} does not describe a node ({error}); start it with fedsafe federate client"
            ) from error

    def write(self, file: Path) -> None:
        """Write it for its owner alone, whole or not at all."""
        write_private(file, (json.dumps(asdict(self), indent=1) + "\n").encode())

    def configs(self) -> list[Path]:
        """The configuration files that the options name."""
        found = []
        for place, argument in enumerate(self.arguments):
            name, equals, value = argument.partition("=")
            if name in ("--config", "-c"):
                value = value if equals else "".join(self.arguments[place + 1 : place + 2])
                found.append(Path(self.cwd) / value)
        return found
