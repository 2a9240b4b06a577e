"""What torchrun, which starts the ranks of a run, says of them in the environment."""

import os
from typing import Any


def is_first_rank() -> bool:
    """Whether this process is the first of the run, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def fit_to_launcher(trainer: Any) -> None:
    """Set `devices` and `num_nodes` of a Trainer's settings to what torchrun started, if it did."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    on_node, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    trainer.devices, trainer.num_nodes = on_node, world // on_node
