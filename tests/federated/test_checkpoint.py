import errno
import os
from pathlib import Path

import pytest
import torch
from lightning import Callback

from fedsafe.federated.checkpoint import AtomicCheckpointIO, RoundCheckpoint


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint that was written whole."""
    file = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"round": 1}, file)
    return file


def test_a_checkpoint_is_read_as_it_was_written(file: Path) -> None:
    assert AtomicCheckpointIO().load_checkpoint(file) == {"round": 1}
    assert [each.name for each in file.parent.iterdir()] == ["last.ckpt"]


def full_disk(checkpoint: object, opened) -> None:
    opened.write(b"half a checkpoint")
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_as_torch_says_it(checkpoint: object, opened) -> None:
    opened.write(b"half a checkpoint")
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


@pytest.mark.parametrize("failure", [full_disk, full_disk_as_torch_says_it])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    file: Path, monkeypatch: pytest.MonkeyPatch, failure
) -> None:
    monkeypatch.setattr(torch, "save", failure)
    with pytest.raises(OSError, match=r"could not be written to .* still holds the last good one"):
        AtomicCheckpointIO().save_checkpoint({"round": 2}, file)
    assert AtomicCheckpointIO().load_checkpoint(file) == {"round": 1}
    assert [each.name for each in file.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_after_writing_keeps_the_last_good_checkpoint(
    file: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(OSError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"round": 2}, file)
    assert AtomicCheckpointIO().load_checkpoint(file) == {"round": 1}


def test_a_first_checkpoint_that_fails_says_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"none was kept. Free some space and resume"):
        AtomicCheckpointIO().save_checkpoint({"round": 1}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_file_of_a_kill_is_ignored_and_replaced(file: Path) -> None:
    scratch = file.with_name("last.ckpt.tmp")
    scratch.write_bytes(b"half")
    assert AtomicCheckpointIO().load_checkpoint(file) == {"round": 1}
    AtomicCheckpointIO().save_checkpoint({"round": 2}, file)
    assert AtomicCheckpointIO().load_checkpoint(file) == {"round": 2}
    assert not scratch.exists()


@pytest.mark.parametrize("steps", [0, -1])
def test_saving_every_zero_steps_is_an_error(steps: int) -> None:
    with pytest.raises(ValueError, match=f"every_n_steps is {steps}; give 1 or more"):
        RoundCheckpoint(every_n_steps=steps)


def test_checkpoints_are_saved_inside_and_at_the_end_of_rounds(federation, monkeypatch) -> None:
    saved = []

    class Noting(RoundCheckpoint):
        def _save(self, trainer) -> None:
            saved.append((trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx + 1))
            super()._save(trainer)

    fed = federation(callbacks=(Noting(every_n_steps=2),), trainer={"enable_checkpointing": True})
    fed.fit()  # rounds of 2 visits x 3 steps
    assert saved == [(0, 2), (0, 4), (0, 6), (1, 2), (1, 4), (1, 6)]
    assert (fed.folder / "checkpoints" / "last.ckpt").is_file()


def test_the_checkpoint_holds_the_adapter_but_not_the_base(federation) -> None:
    fed = federation(callbacks=(RoundCheckpoint(),), trainer={"enable_checkpointing": True}).fit()
    file = fed.folder / "checkpoints" / "last.ckpt"
    saved = torch.load(file, weights_only=False)
    assert not saved["state_dict"]
    rounds = next(state for name, state in saved["callbacks"].items() if "Rounds" in name)
    assert torch.equal(rounds["server"]["adapter"], fed.adapter)
    num_base = sum(p.numel() for p in fed.module.parameters() if not p.requires_grad)
    assert file.stat().st_size < 4 * num_base


class _Stop(Callback):
    """Asks the Trainer to stop when a batch of the second round is done."""

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = trainer.global_step == 8


def test_a_round_that_is_stopped_halfway_is_not_saved_as_finished(federation) -> None:
    longer = {"max_epochs": 3}
    run = federation(callbacks=(RoundCheckpoint(), _Stop()), trainer=longer).fit()
    assert run.trainer.global_step == 8
    last = run.folder / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=False)["global_step"] == 6
    resumed = federation(trainer=longer).fit(ckpt_path=last)
    whole = federation("whole", trainer=longer).fit()
    assert resumed.rows == whole.rows
    assert torch.equal(resumed.adapter, whole.adapter)
