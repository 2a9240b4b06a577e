"""A run that is cut off anywhere and resumed is the run that never was."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from warm import run_python

from fedsafe.federated.client_drift import Scaffold
from fedsafe.federated.round_log import RoundLog
from fedsafe.federated.server_optimizer import FedAdam

FederationMaker = Callable[..., Any]
NUM_STEPS = 2 * 2 * 3  # rounds, clients, steps

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "scaffold": {"client_drift": Scaffold()},
    "fedadam": {"server_optimizer": FedAdam(learning_rate=0.1)},
    "local": {"mode": "local"},
    "central": {"mode": "central"},
}


def settings_of(algorithm: str) -> dict[str, Any]:
    """Everything that could be forgotten: dropout, moments, warm-up, validation."""
    return {
        "model": {"lora_dropout": 0.2, "warmup_steps": 2, "lr_schedule": "cosine"},
        "data": {"validation_share": 0.1},
        "rounds": ALGORITHMS[algorithm],
    }


class EveryStep(ModelCheckpoint):
    """Keeps a checkpoint of every step, the last of a round too, and of every round's end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(Path(str(self.dirpath)) / f"end={trainer.global_step}.ckpt")


class CutOff(Callback):
    """Ends the fit when step `step` (from 1) was taken and saved, before anything else happens."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.strike(trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self.strike(trainer)

    def strike(self, trainer: Trainer) -> None:
        if trainer.global_step >= self.step:
            raise InterruptedError("cut off")


def without_validation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("val/")} for row in rows]


def assert_same(resumed: Any, whole: Any, *, all_validated: bool = True) -> None:
    """Same adapters, bit for bit; same record; the newest adapter is on disk."""
    assert torch.equal(resumed.adapter, whole.adapter)
    own, expected = (run.rounds.server.own_adapters for run in (resumed, whole))
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[client], expected[client]) for client in own)
    strip = (lambda rows: rows) if all_validated else without_validation
    assert strip(resumed.rows) == strip(whole.rows)
    for file in whole.folder.glob("adapter*/**/adapter_model.safetensors"):
        twin = resumed.folder / file.relative_to(whole.folder)
        assert twin.read_bytes() == file.read_bytes(), twin


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resuming_from_any_checkpoint_of_a_run_gives_the_same_run(
    federation: FederationMaker, algorithm: str, tmp_path: Path
) -> None:
    settings = settings_of(algorithm)
    whole = federation("whole", **settings, callbacks=(EveryStep(tmp_path / "saved"),))
    whole.fit()
    steps = [tmp_path / "saved" / f"step={n}.ckpt" for n in range(1, NUM_STEPS + 1)]
    for checkpoint in [*steps, tmp_path / "saved" / "end=6.ckpt"]:
        name = f"from {checkpoint.stem}"
        shutil.copytree(whole.folder, tmp_path / name)  # the kill came long after the checkpoint
        resumed = federation(name, **settings).fit(ckpt_path=checkpoint)
        assert_same(resumed, whole, all_validated=checkpoint.stem not in ("step=6", "step=12"))


def test_rounds_of_different_lengths_resume_at_their_last_steps_too(
    federation: FederationMaker, tmp_path: Path
) -> None:
    settings = {
        "rounds": {"local_epochs": 1, "clients_per_round": 2, "seed": 1},
        "trainer": {"max_epochs": 5},
    }
    whole = federation("whole", **settings, callbacks=(EveryStep(tmp_path / "saved"),)).fit()
    lengths = [len(whole.rounds._schedule.plan(round_)) for round_ in range(5)]
    assert lengths == [4, 4, 5, 6, 6]
    for step in (4, 8, 9, 13, 19, 25):
        shutil.copytree(whole.folder, tmp_path / f"from {step}")
        checkpoint = tmp_path / "saved" / f"step={step}.ckpt"
        assert_same(federation(f"from {step}", **settings).fit(ckpt_path=checkpoint), whole)


class _AfterValidation(ModelCheckpoint):
    """Keeps a checkpoint of every validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(Path(str(self.dirpath)) / f"{trainer.global_step}.ckpt")


def test_a_checkpoint_after_validation_keeps_its_figures(
    federation: FederationMaker, tmp_path: Path
) -> None:
    settings = settings_of("fedavg")
    whole = federation("whole", **settings, callbacks=(_AfterValidation(tmp_path / "saved"),))
    whole.fit()
    assert all("val/loss" in row for row in whole.rows)
    for steps in (6, 12):
        name = f"from {steps}"
        shutil.copytree(whole.folder, tmp_path / name)
        checkpoint = tmp_path / "saved" / f"{steps}.ckpt"
        assert_same(federation(name, **settings).fit(ckpt_path=checkpoint), whole)


def test_resuming_a_finished_run_changes_nothing(
    federation: FederationMaker, tmp_path: Path
) -> None:
    whole = federation("whole", callbacks=(EveryStep(tmp_path / "saved"),)).fit()
    before = {f: f.read_bytes() for f in whole.folder.rglob("*") if f.is_file()}
    again = federation("whole").fit(ckpt_path=tmp_path / "saved" / "end=12.ckpt")
    assert torch.equal(again.module.flat_adapter().read(), whole.adapter)
    assert {f: f.read_bytes() for f in whole.folder.rglob("*") if f.is_file()} == before


def test_a_run_cut_off_after_any_step_and_resumed_is_the_run_that_never_was(
    federation: FederationMaker, tmp_path: Path
) -> None:
    settings = settings_of("scaffold")
    whole = federation("whole", **settings).fit()
    for step in range(1, NUM_STEPS + 1):
        name, saved = f"cut after {step}", tmp_path / f"saved until {step}"
        with pytest.raises(InterruptedError, match="cut off"):
            federation(name, **settings, callbacks=(CutOff(step), EveryStep(saved))).fit()
        resumed = federation(name, **settings).fit(ckpt_path=saved / f"step={step}.ckpt")
        assert_same(resumed, whole, all_validated=step not in (6, 12))


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_run_that_never_was(
    tiny_gpt2: Path, conversations: Path, tmp_path: Path
) -> None:
    def train(folder: str, *options: str) -> int:
        arguments = [tiny_gpt2, conversations, tmp_path / folder, *options]
        script = Path(__file__).with_name("killed_run.py")
        return run_python(script, *arguments).returncode

    assert train("whole") == 0
    assert train("killed", "--kill-at", "2") == -signal.SIGKILL
    assert train("killed", "--resume", "--kill-at", "7") == -signal.SIGKILL
    assert train("killed", "--resume", "--kill-at", "12") == -signal.SIGKILL
    assert train("killed", "--resume") == 0
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (killed / adapter).read_bytes() == (whole / adapter).read_bytes()
    rows = [
        [{**row, "seconds": None} for row in RoundLog(folder / "rounds.jsonl").read()]
        for folder in (killed, whole)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
