"""The tiny federation with each client at a node of its own, all of them in this process."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from federations import CLIENT_SIZES, Federation
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from memory_post import MemoryPost, Node

from fedsafe.federated.remote.client_trainer import ClientTrainer
from fedsafe.federated.remote.fleet import Fleet
from fedsafe.federated.remote.own_data import OwnData
from fedsafe.federated.remote.remote_data import RemoteData
from fedsafe.federated.remote.rounds import RemoteRounds
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.model.module import LoraLM

MODEL = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-2}
DATA = {"batch_size": 3, "validation_share": 0.0}
ROUNDS = {"clients_per_round": 2, "local_steps": 3}
"""As `build_federation` has them."""


def build_node(
    name: str,
    *,
    base: Path,
    path: Path,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    rounds: dict[str, Any] | None = None,
) -> ClientTrainer:
    """One client on its own; `model`, `data` and `rounds` replace single settings."""
    return ClientTrainer(
        LoraLM(str(base), **MODEL | (model or {})),
        OwnData(name, path=str(path), tokenizer=str(base), **DATA | (data or {})),
        FederatedRounds(**deepcopy(_steps(rounds))),
        trainer_settings={"accelerator": "cpu"},
    )


def build_nodes(
    *, base: Path, path: Path, names: tuple[str, ...] = tuple(sorted(CLIENT_SIZES)), **settings: Any
) -> dict[int, Node]:
    """A node for each client, numbered from 11 on; the settings are those of `build_node`."""
    nodes = [build_node(name, base=base, path=path, **deepcopy(settings)) for name in names]
    return {number: node.answer for number, node in enumerate(nodes, start=11)}


def build_server(
    folder: Path,
    post: MemoryPost,
    *,
    base: Path,
    fleet: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    rounds: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> Federation:
    """The server of a federation; the settings replace single ones."""
    waiting = {"patience_seconds": 0.5, "grace_seconds": 0.5, "deadline_seconds": 30.0}
    federated = RemoteRounds(**_steps(rounds))
    federated.connect(Fleet(**{"min_clients": 1, **waiting, **(fleet or {})}), post)
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
    return Federation(
        folder,
        LoraLM(str(base), **MODEL | (model or {})),
        RemoteData(**DATA | (data or {})),
        federated,
        Trainer(callbacks=[federated, *callbacks], **trainer),
    )


def _steps(rounds: dict[str, Any] | None) -> dict[str, Any]:
    rounds = ROUNDS | (rounds or {})
    return rounds | {"local_steps": None} if "local_epochs" in rounds else rounds
