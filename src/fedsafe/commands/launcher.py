"""What the launcher of a run's ranks, torchrun or Slurm, says of them in the environment."""

import os
from typing import Any


def name_slurm_tasks() -> None:
    """Say of the tasks that `srun` started what torchrun would say of its own.

    Raises:
        ValueError: If srun was not told how many tasks a node has.
    """
    if "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    on_node = os.environ.get("SLURM_NTASKS_PER_NODE")
    if on_node is None:
        raise ValueError(
            "srun started several tasks without saying how many on each node; give it "
            "--ntasks-per-node, one task a GPU"
        )
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    slurm = SLURMEnvironment(auto_requeue=False)
    os.environ.update(
        RANK=str(slurm.global_rank()),
        WORLD_SIZE=str(slurm.world_size()),
        LOCAL_RANK=str(slurm.local_rank()),
        LOCAL_WORLD_SIZE=on_node,
        NODE_RANK=str(slurm.node_rank()),
        MASTER_ADDR=slurm.main_address,
        MASTER_PORT=str(slurm.main_port),
    )


def own_rank() -> int:
    """The number of this process among those of the run; 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """Whether this process is the first of the run, or the only one."""
    return own_rank() == 0


def fit_to_launcher(trainer: Any) -> None:
    """Set `devices` and `num_nodes` of a Trainer's settings to what was started, if anything was.

    A Trainer alone may start ranks itself, and says less of them.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return
    on_node, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    trainer.devices, trainer.num_nodes = on_node, world // on_node
