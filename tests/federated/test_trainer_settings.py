"""Runs that would go wrong without a sign of it, and are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from fedsafe.federated import trainer_settings
from fedsafe.federated.checkpoint import RoundCheckpoint
from fedsafe.federated.client_drift import Scaffold
from fedsafe.federated.trainer_settings import check_trainer
from fedsafe.peers import Peers
from fedsafe.strategies.layout import Layout, layout_of

FederationMaker = Callable[..., Any]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"reload_dataloaders_every_n_epochs": 0},
            "rounds need reload_dataloaders_every_n_epochs=1",
        ),
        ({"limit_train_batches": 0.5}, "rounds need limit_train_batches=1.0"),
        ({"limit_train_batches": 1}, r"limit_train_batches=1\): rounds need .*=1.0"),
        ({"fast_dev_run": True}, "rounds need limit_train_batches=1.0"),
        ({"overfit_batches": 1.0}, "rounds need overfit_batches=0.0"),
        ({"val_check_interval": 0.5}, "half-trained adapter would be validated"),
        ({"val_check_interval": 1}, "half-trained adapter would be validated"),
        ({"precision": "bf16-true"}, "'bf16-true'.* would round the adapter, which is averaged in"),
        ({"max_epochs": -1}, "max_epochs is -1; it is the number of rounds"),
        ({"max_steps": 5}, r"max_steps=5\): rounds need max_steps=-1, .* end inside a round; give"),
        ({"max_epochs": None, "max_steps": 5}, "rounds need max_steps=-1"),
        ({"max_time": "00:01:00:00"}, "cannot run with max_time or a Timer.*inside a round; leave"),
    ],
)
def test_a_trainer_that_would_go_wrong_silently_is_refused(
    federation: FederationMaker, trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        federation(trainer=trainer).fit()


@pytest.mark.parametrize(
    "callback",
    [
        GradientAccumulationScheduler({0: 2}),
        StochasticWeightAveraging(swa_lrs=0.1),
        EMAWeightAveraging(),
    ],
    ids=lambda c: type(c).__name__,
)
def test_a_callback_that_knows_of_no_visits_is_refused(
    federation: FederationMaker, callback: Any
) -> None:
    with pytest.raises(ValueError, match=f"cannot run with {type(callback).__name__}"):
        federation(callbacks=(callback,)).fit()


def test_gradients_that_are_scaled_are_not_corrected(federation: FederationMaker) -> None:
    for drift in (None, Scaffold()):
        run = federation(str(drift), rounds={"client_drift": drift})
        run.trainer.strategy.precision_plugin.precision = (
            "16-mixed"  # needs a GPU by the front door
        )
        if drift is None:
            run.fit()
            continue
        with pytest.raises(ValueError, match="scales the gradients that client_drift corrects; gi"):
            run.fit()


def test_another_module_or_data_module_is_refused(
    federation: FederationMaker, tiny_gpt2: Path
) -> None:
    run = federation(data={"tokenizer": str(tiny_gpt2)})
    with pytest.raises(
        ValueError, match="trains a LoraLM on a FederatedDataModule; got LoraLM and"
    ):
        run.trainer.fit(run.module, train_dataloaders=[1])
    with pytest.raises(ValueError, match="got BoringModel and FederatedDataModule"):
        run.trainer.fit(BoringModel(), datamodule=run.data)


def test_a_folder_with_another_run_is_refused_and_left_as_it_is(
    federation: FederationMaker,
) -> None:
    run = federation().fit()
    before = (run.folder / "rounds.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds another run; resume it with ckpt_path, or give"):
        federation().fit()
    assert (run.folder / "rounds.jsonl").read_bytes() == before


def test_data_without_rounds_is_refused(federation: FederationMaker) -> None:
    run = federation()
    run.trainer.callbacks.remove(run.rounds)
    with pytest.raises(ValueError, match="no schedule of visits; add FederatedRounds"):
        run.fit()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 90}, "the tokenizer has 101 tokens, the base 90; set vocab_size in from_c"),
        (
            {"n_positions": 20},
            r"longest sample has \d\d tokens, the base has 20 positions; lower max",
        ),
    ],
)
def test_samples_that_the_model_cannot_read_are_refused(
    federation: FederationMaker, tiny_gpt2: Path, values: dict[str, int], message: str
) -> None:
    config = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 128} | values
    run = federation(
        model={"base": "gpt2", "from_config": config}, data={"tokenizer": str(tiny_gpt2)}
    )
    with pytest.raises(ValueError, match=message):
        run.fit()


class UnknownStrategy(SingleDeviceStrategy):
    """One that fedsafe has not heard of."""


def test_a_strategy_whose_adapter_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot run under FSDPStrategy, .*configs/strategy: ddp"):
        layout_of(FSDPStrategy())


def test_a_subclass_of_one_device_is_one_device() -> None:
    assert layout_of(UnknownStrategy("cpu")) == Layout()


def test_ranks_apart_refuse_checkpoints_inside_rounds_before_anything_is_trained(
    federation: FederationMaker,
) -> None:
    run = federation(callbacks=(RoundCheckpoint(every_n_steps=5),))
    with (
        patch.object(trainer_settings, "layout_of", lambda _: Layout(clients=Peers(0, 2))),
        pytest.raises(ValueError, match=r"every_n_steps is 5, but ranks that train different"),
    ):
        check_trainer(run.trainer)
