"""Federations that run in one process or on several ranks: what test_parallel_clients starts.

    python parallel_runs.py BASE CONVERSATIONS FOLDER STRATEGY/NAME ...

Each run writes to FOLDER/STRATEGY/NAME, and goes on from GO_ON there if there is one. Under
torchrun all ranks run them, one after another.
"""

import argparse
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from federations import Federation, build_federation
from lightning import Callback, LightningModule, Trainer

from fedsafe.data.packing import TrainingBatch
from fedsafe.federated.checkpoint import RoundCheckpoint, last_checkpoint
from fedsafe.federated.client_drift import Scaffold
from fedsafe.federated.server_optimizer import FedAdam
from fedsafe.strategies.client_parallel import ClientParallelStrategy

RESUMED = "scaffold-3"
"""Has a third round, to go on with."""
LOCAL_STEPS = 3
BAD_CLIENT = 1
GO_ON = "after-2.ckpt"
"""The checkpoint of the second round's end."""
MESSAGES = "messages.json"
"""How often rank 0 spoke with the others in a run, and how."""


def with_clients(number: int, **rounds: Any) -> dict[str, Any]:
    return {"rounds": {"clients_per_round": number, "local_steps": LOCAL_STEPS, **rounds}}


CASES: dict[str, dict[str, Any]] = {
    **{f"fedavg-{k}": with_clients(k) for k in (3, 4, 1)},
    **{f"scaffold-{k}": with_clients(k, client_drift=Scaffold()) for k in (3, 4, 1)},
    "fedadam": with_clients(3, server_optimizer=FedAdam(0.1)),
    "epochs": {"rounds": {"clients_per_round": 3, "local_epochs": 1, "weighting": "tokens"}},
    "accumulated": {**with_clients(3), "trainer": {"accumulate_grad_batches": 2}},
    "twice-the-steps": {"rounds": {"clients_per_round": 3, "local_steps": 2 * LOCAL_STEPS}},
    "failing": with_clients(4, failure_probability=0.5, client_drift=Scaffold(), seed=1),
    "refused": with_clients(4, client_drift=Scaffold()),
    "local": with_clients(3, mode="local"),
    "central": with_clients(3, mode="central"),
}
"""Settings of each run; what all share is in `make`."""


class Poison(Callback):
    """Spoils what one client has trained, before the server gets it."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, _: Any, batch: TrainingBatch, *__: Any
    ) -> None:
        if batch.key.client == BAD_CLIENT and batch.key.ends_visit:
            parameter = next(p for p in pl_module.parameters() if p.requires_grad)
            parameter.data.view(-1)[3] = torch.nan


class KeepSecond(Callback):
    """Keeps the checkpoint of the second round's end; put it after the one that saves."""

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero and trainer.current_epoch == 1:
            folder = Path(trainer.default_root_dir)
            shutil.copy(last_checkpoint(folder), folder / GO_ON)


def make(
    name: str, exchange: str | None, *, base: Path, conversations: Path, folder: Path
) -> Federation:
    """A run with everything that ranks could get wrong: dropout, warm-up, validation.

    Args:
        name: One of `CASES`.
        exchange: What ranks with clients in parallel tell each other; None is one process.
        folder: Its run directory.
    """
    ranks = {"strategy": "auto"}
    if exchange is not None:
        strategy = ClientParallelStrategy(exchange)  # type: ignore[arg-type]
        ranks = {"strategy": strategy, "devices": int(os.environ["WORLD_SIZE"])}
    federation = build_federation(
        folder,
        base=base,
        path=conversations,
        model={"lora_dropout": 0.2, "warmup_steps": 2, "lr_schedule": "cosine"},
        data={"validation_share": 0.1},
        rounds=CASES[name]["rounds"],
        trainer={
            "max_epochs": 3 if name == RESUMED else 2,
            **ranks,
            **CASES[name].get("trainer", {}),
        },
        callbacks=(RoundCheckpoint(), KeepSecond()),
    )
    if name == "refused":
        federation.trainer.callbacks.insert(0, Poison())  # before the rounds take the update
    return federation


def fit(federation: Federation) -> None:
    """Train, or go on."""
    checkpoint = federation.folder / GO_ON
    federation.fit(ckpt_path=checkpoint if checkpoint.exists() else None)


@contextmanager
def counted_messages(file: Path) -> Iterator[None]:
    """Write down how often each of torch's collectives was called."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        function = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return patch.object(dist, name, call)

    names = ("all_gather_object", "all_reduce", "barrier", "broadcast", "broadcast_object_list")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(counting(name))
        yield
    if dist.get_rank() == 0:
        file.write_text(json.dumps(calls))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("base", "conversations", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("runs", nargs="+")
    options = parser.parse_args()
    for run in options.runs:
        exchange, name = run.split("/")[-2:]
        federation = make(
            name,
            exchange,
            base=options.base,
            conversations=options.conversations,
            folder=options.folder / run,
        )
        with counted_messages(options.folder / run / MESSAGES):
            fit(federation)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
