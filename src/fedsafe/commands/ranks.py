"""Commands on several ranks, as torchrun starts them: all judge or speak, the first one writes."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fedsafe.peers import ALONE, Peers

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: while one loads its model, or has a slow batch."""


@contextmanager
def joined() -> Iterator[Peers]:
    """All ranks of the command, which find each other here; alone without torchrun.

    Each has a GPU of its own where there are any. What another than the first prints is not shown.
    `cli` parts them again, for a process can join only once.

    Raises:
        ValueError: If there are fewer GPUs than ranks on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if not dist.is_initialized():
        if torch.cuda.is_available():
            _take_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
        dist.init_process_group("gloo", timeout=PATIENCE)  # texts and numbers travel, no tensors
    peers = Peers(dist.get_rank(), size)
    with ExitStack() as stack:
        if peers.index > 0:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
        yield peers
    peers.wait()


def _take_gpu(number: int, num_gpus: int) -> None:
    if number >= num_gpus:
        raise ValueError(
            f"rank {number} of this machine has no GPU of its own, {num_gpus} are visible; start "
            f"{num_gpus} ranks (--nproc_per_node), or hide the GPUs (CUDA_VISIBLE_DEVICES=) to "
            "compute on CPUs"
        )
    torch.cuda.set_device(number)


def check_agreed(peers: Peers, what: str, number: int) -> None:
    """Refuse ranks that are about to work on different things.

    Raises:
        ValueError: If the numbers differ.
    """
    numbers = peers.gather(number)
    if len(set(numbers)) > 1:
        found = ", ".join(f"{each:,} on rank {rank}" for rank, each in enumerate(numbers))
        raise ValueError(f"the ranks see different {what} ({found}); give all the same")
