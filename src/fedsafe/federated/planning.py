"""The schedule of a run, from the settings of its parts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from warnings import warn

from lightning import LightningModule, Trainer

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.federated.constitutional_training import ConstitutionalTraining
from fedsafe.federated.schedule import Schedule, num_sampled
from fedsafe.federated.sharing import Share
from fedsafe.model.module import LoraLM
from fedsafe.strategies.layout import Layout


def checked_data(
    trainer: Trainer, module: LightningModule, *, cai: ConstitutionalTraining | None
) -> FederatedDataModule:
    """The Trainer's data, if it goes with the model and with the rules of `federated.cai`.

    Raises:
        ValueError: If it does not.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(module, LoraLM) or not isinstance(data, FederatedDataModule):
        raise ValueError(
            "FederatedRounds trains a LoraLM on a FederatedDataModule; got "
            f"{type(module).__name__} and {type(data).__name__}"
        )
    if (cai is None) != (data.cai is None):
        raise ValueError(
            "constitutional training needs data.cai, its data, and federated.cai, its rules; "
            f"only {'data' if cai is None else 'federated'}.cai is given"
        )
    return data


def make_schedule(
    settings: Mapping[str, Any],
    *,
    trainer: Trainer,
    data: FederatedDataModule,
    layout: Layout,
    elsewhere: bool = False,
) -> Schedule:
    """Who trains when, and what of it falls to this rank.

    Args:
        settings: Those of `FederatedRounds` by name.
        trainer: Its `max_epochs` is the number of rounds.
        data: Gives the partition.
        layout: Who does what.
        elsewhere: Clients train on other machines.
    """
    assert trainer.max_epochs is not None
    cai = settings["cai"]
    federation = Schedule(
        partition=data.partition,
        num_rounds=trainer.max_epochs,
        clients_per_round=num_sampled(settings["clients_per_round"], data.partition.num_holding),
        batch_size=data.batch_size,
        local_steps=settings["local_steps"],
        local_epochs=settings["local_epochs"],
        num_micro=trainer.accumulate_grad_batches,
        failure_probability=settings["failure_probability"],
        seed=settings["seed"],
        server_visits=cai.server_visits if cai is not None else "none",
        sample_tokens=None if elsewhere else data.store.lengths,
        elsewhere=elsewhere,
    )
    if settings["mode"] == "central":
        federation = federation.in_one_place()
    clients, ranks = layout.clients, layout.data
    _warn_of_idle(clients.size, federation.clients_per_round)
    return replace(federation, share=Share(clients.index, clients.size, ranks.index, ranks.size))


def _warn_of_idle(num_groups: int, num_clients: int) -> None:
    if num_groups > num_clients:
        warn(
            f"{num_groups} ranks, or groups of ranks, train clients, and a round has {num_clients}:"
            f" {num_groups - num_clients} idle in every round; start fewer, or raise "
            "clients_per_round",
            stacklevel=2,
        )


def weight_of(
    client: int, weighting: str, *, schedule: Schedule, data: FederatedDataModule
) -> float:
    """What a client's weight in the mean is."""
    if weighting == "uniform":
        return 1.0
    samples = schedule.partition.samples_of(client)
    if weighting == "samples":
        return float(len(samples))
    return float(data.store.answer_counts[samples].sum())
