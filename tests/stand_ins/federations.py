"""A tiny federation that trains in a fraction of a second, in one process or on several ranks."""

import json
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from round_rows import without_seconds
from torch import Tensor

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.federated.local_training import train_client
from fedsafe.federated.partition import Natural
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.server import Update
from fedsafe.model.module import LoraLM

CLIENT_SIZES = {"ada": 9, "bob": 4, "cyd": 7, "dee": 6}
"""Samples of each client; with batches of 3, the last batch of some passes is smaller."""


def write_conversations(file: Path) -> None:
    """Write a JSONL file of short conversations of four clients of different sizes."""
    rng = random.Random(0)
    words = ["red", "blue", "green", "cat", "dog", "sun", "moon"]

    def sample(client: str) -> dict[str, str]:
        prompt, response = (" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(2))
        return {"prompt": prompt, "response": response, "client": client}

    rows = [sample(client) for client, size in CLIENT_SIZES.items() for _ in range(size)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class Federation:
    """One run and what it left behind."""

    folder: Path
    module: LoraLM
    data: FederatedDataModule
    rounds: FederatedRounds
    trainer: Trainer

    def fit(self, *, ckpt_path: Path | None = None) -> "Federation":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer.fit(self.module, datamodule=self.data, ckpt_path=ckpt_path)
        return self

    @property
    def adapter(self) -> Tensor:
        """The newest global adapter."""
        return self.rounds.server.adapter

    @property
    def start(self) -> Tensor:
        """The adapter that the run began with."""
        fresh = LoraLM(**self.module.hparams)
        fresh.configure_model()
        return fresh.flat_adapter().read()

    def train_alone(self, *, round_: int) -> dict[int, Update]:
        """What each client of a round gives back, trained by itself from the initial adapter."""
        return {
            visit.client: train_client(
                self.module,
                self.data.client_dataloader(visit),
                start=self.start,
                trainer_settings={"accelerator": "cpu"},  # as the runs that it is compared with
            )
            for visit in self.rounds._schedule.plan(round_).visits
            if not visit.failed
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """`rounds.jsonl` without the time it took, which no two runs share."""
        lines = (self.folder / "rounds.jsonl").read_text().splitlines()
        return [without_seconds(json.loads(line)) for line in lines]


def build_federation(
    folder: Path,
    *,
    base: Path,
    path: Path,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    rounds: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> Federation:
    """Make a federation; `model`, `data`, `rounds` and `trainer` replace single settings.

    Args:
        folder: Its run directory.
        base: Folder of the base model.
        path: JSONL file of the clients' conversations.
    """
    model = {"base": str(base), "rank": 4, "alpha": 8.0, "learning_rate": 1e-2} | (model or {})
    data = {
        "path": str(path),
        "partition": Natural(),
        "batch_size": 3,
        "validation_share": 0.0,
    } | (data or {})
    rounds = {"clients_per_round": 2} | (rounds or {})
    if "local_epochs" not in rounds:
        rounds = {"local_steps": 3} | rounds
    trainer = {
        "default_root_dir": folder,
        "max_epochs": 2,
        "accelerator": "cpu",
        "reload_dataloaders_every_n_epochs": 1,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | (trainer or {})
    federated = FederatedRounds(**rounds)
    return Federation(
        Path(trainer["default_root_dir"]),
        LoraLM(**model),
        FederatedDataModule(**data),
        federated,
        Trainer(callbacks=[federated, *callbacks], **trainer),
    )
