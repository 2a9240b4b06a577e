"""What a checkpoint holds, and which runs may not go on from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint

from fedsafe.federated.client_drift import FedProx, Scaffold
from fedsafe.federated.partition import IID
from fedsafe.federated.server_optimizer import FedAdam, FedAvgM

FederationMaker = Callable[..., Any]


@pytest.fixture
def checkpoint(federation: FederationMaker) -> Path:
    run = federation().fit()
    run.trainer.save_checkpoint(run.folder / "a.ckpt")
    return run.folder / "a.ckpt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"rank": 8}}, "another run: model.rank was 4 and is 8. Resume with"),
        ({"model": {"alpha": 4.0}}, "model.alpha was 8.0 and is 4.0"),
        ({"model": {"seed": 1}}, "model.seed was 0 and is 1"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype was 'float32' and is 'bfloat16'"),
        ({"model": {"optimizer": "sgd"}}, "model.optimizer was 'adamw' and is 'sgd'"),
        ({"model": {"target_modules": ["c_attn"]}}, r"target_modules was 'all-linear' and is \['c"),
        ({"rounds": {"seed": 5}}, "federated.seed was 0 and is 5"),
        ({"rounds": {"local_steps": 2}}, "federated.local_steps was 3 and is 2"),
        ({"rounds": {"clients_per_round": 3}}, "federated.clients_per_round was 2 and is 3"),
        ({"rounds": {"mode": "local"}}, "federated.mode was 'federated' and is 'local'"),
        ({"rounds": {"weighting": "uniform"}}, "weighting was 'samples' and is 'uniform'"),
        ({"rounds": {"client_drift": Scaffold()}}, r"was 'FedAvg\+NoneType' and is 'FedAvg\+Sc"),
        ({"rounds": {"server_optimizer": FedAdam()}}, r"'FedAvg\+NoneType' and is 'FedAdam\+N"),
        (
            {"data": {"partition": IID(4)}},
            r"data.partition was 'Natural \w{12}' and is 'IID \w{12}'",
        ),
        ({"data": {"batch_size": 4}}, "data.batch_size was 3 and is 4"),
        ({"data": {"max_length": 400}}, "data.max_length was 512 and is 400"),
        ({"data": {"seed": 2}}, "data.seed was 0 and is 2"),
        ({"data": {"validation_share": 0.2}}, "data.validation_share was 0.0 and is 0.2"),
    ],
    ids=lambda x: next(iter(next(iter(x.values())))) if isinstance(x, dict) else "",
)
def test_a_run_that_differs_may_not_go_on(
    federation: FederationMaker, checkpoint: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        federation(**settings).fit(ckpt_path=checkpoint)


def test_every_difference_is_named(federation: FederationMaker, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"model.rank was 4 and is 2; model.seed was 0 and is 9"):
        federation(model={"rank": 2, "seed": 9}).fit(ckpt_path=checkpoint)


def test_another_base_may_not_go_on(
    federation: FederationMaker, checkpoint: Path, tiny_llama: Path
) -> None:
    with pytest.raises(ValueError, match=r"model.base was '.*gpt2.*' and is '.*llama.*'"):
        federation(base=tiny_llama).fit(ckpt_path=checkpoint)


def test_a_checkpoint_of_something_else_is_refused(
    federation: FederationMaker, checkpoint: Path
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    del saved["fedsafe_model"]
    torch.save(saved, checkpoint)
    with pytest.raises(ValueError, match=r"to another run: model.alpha was None and is 8.0"):
        federation().fit(ckpt_path=checkpoint)


class _AfterAStep(Checkpoint):
    """Keeps checkpoints of the inside and of the end of rounds."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in (4, 10):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt")


RULES = {"server_optimizer": FedAvgM(0.5), "client_drift": FedProx(0.1)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer": {"accumulate_grad_batches": 2}}, r"accumulate_grad_batches was 1 and is 2"),
        ({"rounds": {"failure_probability": 0.1}}, r"failure_probability was 0.0 and is 0.1"),
        (
            {"rounds": {"server_optimizer": FedAvgM(0.9)}},
            r"server_optimizer.momentum was 0.5 and is 0.9",
        ),
        ({"rounds": {"client_drift": FedProx(0.2)}}, r"client_drift.mu was 0.1 and is 0.2"),
    ],
)
def test_rules_may_change_between_rounds_but_not_inside_one(
    federation: FederationMaker, settings: dict[str, Any], message: str
) -> None:
    run = federation(rounds=RULES, callbacks=(_AfterAStep(),)).fit()
    settings = {**settings, "rounds": RULES | settings.get("rounds", {})}
    with pytest.raises(ValueError, match=message):
        federation(**settings).fit(ckpt_path=run.folder / "10.ckpt")
    again = federation(**settings).fit(ckpt_path=run.folder / "6.ckpt")
    assert [row["round"] for row in again.rows] == [1, 2]


class _InsideAStep(Checkpoint):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "part.ckpt")
        raise InterruptedError("cut off")


def test_a_checkpoint_inside_an_accumulated_step_is_refused(federation: FederationMaker) -> None:
    parts = {"accumulate_grad_batches": 2}
    run = federation(trainer=parts, callbacks=(_InsideAStep(),))
    with pytest.raises(InterruptedError, match="cut off"):
        run.fit()
    with pytest.raises(ValueError, match="between accumulated parts of a step"):
        federation(trainer=parts).fit(ckpt_path=run.folder / "part.ckpt")


def test_a_lost_record_of_rounds_is_noticed(federation: FederationMaker, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="has 0 rounds, but the checkpoint was written after 2"):
        federation("elsewhere", trainer={"max_epochs": 3}).fit(ckpt_path=checkpoint)


def test_a_run_may_go_on_for_more_rounds(federation: FederationMaker, checkpoint: Path) -> None:
    longer = federation(trainer={"max_epochs": 3}).fit(ckpt_path=checkpoint)
    whole = federation("whole", trainer={"max_epochs": 3}).fit()
    assert torch.equal(longer.adapter, whole.adapter)
    assert longer.rows == whole.rows


def test_a_checkpoint_holds_the_adapter_and_the_federation_but_not_the_base(
    federation: FederationMaker,
) -> None:
    rounds = {"client_drift": Scaffold(), "server_optimizer": FedAdam()}
    run = federation(rounds=rounds).fit()
    run.trainer.save_checkpoint(run.folder / "a.ckpt")
    saved = torch.load(run.folder / "a.ckpt", weights_only=True)
    assert not saved["state_dict"]
    assert not saved["optimizer_states"]
    federated = next(v for k, v in saved["callbacks"].items() if "FederatedRounds" in k)
    assert torch.equal(federated["server"]["adapter"], run.adapter)
    sizes: dict[int, int] = {}

    def measure(value: object) -> None:
        if isinstance(value, torch.Tensor):
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                measure(item)

    measure(saved)
    adapter = run.adapter.numel() * 4
    clients = len(run.rounds.client_drift.client_controls)
    # parameters, Adam's moments, the server's adapter, its sum and moments, the control variates
    assert sum(sizes.values()) <= (1 + 2 + 1 + 1 + 2 + 1 + clients) * adapter + 10_000
    base = sum(p.numel() * 4 for p in run.module.parameters() if not p.requires_grad)
    assert max(sizes.values()) < base / 2


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("inside_a_round", [False, True])
def test_evaluating_a_checkpoint_evaluates_its_global_adapter(
    federation: FederationMaker, conversations: Path, stage: str, inside_a_round: bool
) -> None:
    data = {"validation_share": 0.2, "test_path": str(conversations)}
    run = federation(data=data, trainer={"max_epochs": 1}).fit()
    checkpoint = run.folder / "a.ckpt"
    run.trainer.save_checkpoint(checkpoint)
    (expected,) = getattr(run.trainer, stage)(run.module, datamodule=run.data, verbose=False)
    if inside_a_round:  # then the model holds the adapter of the client whose turn it is
        saved = torch.load(checkpoint, weights_only=True)
        for tensor in saved["state_dict"].values():
            tensor.add_(0.3)
        torch.save(saved, checkpoint)
    other = federation("other", data=data)
    (figures,) = getattr(other.trainer, stage)(
        other.module, datamodule=other.data, ckpt_path=checkpoint, verbose=False
    )
    assert figures == expected
    assert len(figures) == 1
