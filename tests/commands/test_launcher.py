import os
from types import SimpleNamespace

import pytest

from fedsafe.commands.launcher import fit_to_launcher, is_first_rank, name_slurm_tasks, own_rank

SAID_BY_TORCHRUN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def test_devices_and_nodes_are_what_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    trainer = SimpleNamespace(devices=1, num_nodes=1)
    fit_to_launcher(trainer)
    assert (trainer.devices, trainer.num_nodes) == (4, 2)


def test_without_a_launcher_the_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    trainer = SimpleNamespace(devices="auto", num_nodes=3)
    fit_to_launcher(trainer)
    assert (trainer.devices, trainer.num_nodes) == ("auto", 3)


def test_a_single_process_is_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert (own_rank(), is_first_rank()) == (0, True)
    monkeypatch.setenv("RANK", "1")
    assert (own_rank(), is_first_rank()) == (1, False)


def started_by_srun(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    for name in (*SAID_BY_TORCHRUN, "NODE_RANK"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    said = {
        "STEP_NUM_TASKS": "8",
        "NTASKS_PER_NODE": "4",
        "NTASKS": "8",
        "PROCID": "5",
        "LOCALID": "1",
        "NODEID": "1",
        "JOB_ID": "123456",
        "JOB_NAME": "train",
        "NODELIST": "alpha[1-2]",
    }
    for name, value in (said | more).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_PORT", "4711")


def test_the_tasks_of_srun_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_srun(monkeypatch)
    name_slurm_tasks()
    assert [os.environ[name] for name in SAID_BY_TORCHRUN] == ["5", "8", "1", "4", "alpha1", "4711"]
    trainer = SimpleNamespace(devices=1, num_nodes=1)
    fit_to_launcher(trainer)
    assert (trainer.devices, trainer.num_nodes) == (4, 2)


def test_one_task_and_what_torchrun_started_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_srun(monkeypatch, STEP_NUM_TASKS="1")
    name_slurm_tasks()
    assert "WORLD_SIZE" not in os.environ
    started_by_srun(monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "16")
    name_slurm_tasks()
    assert os.environ["WORLD_SIZE"] == "16"
    assert "RANK" not in os.environ


def test_srun_must_be_told_how_many_tasks_a_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_srun(monkeypatch)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ValueError, match="without saying how many on each node; give it --ntasks"):
        name_slurm_tasks()


def test_nothing_of_srun_stays_behind() -> None:
    """The tests above give back what they set; a rank of another node would wait for its first."""
    assert not {"NODE_RANK", "SLURM_PROCID"} & os.environ.keys()
