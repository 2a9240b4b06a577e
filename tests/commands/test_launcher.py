from types import SimpleNamespace

import pytest

from fedsafe.commands.launcher import fit_to_launcher, is_first_rank


def test_devices_and_nodes_are_what_torchrun_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    trainer = SimpleNamespace(devices=1, num_nodes=1)
    fit_to_launcher(trainer)
    assert (trainer.devices, trainer.num_nodes) == (4, 2)


def test_without_torchrun_the_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    trainer = SimpleNamespace(devices="auto", num_nodes=3)
    fit_to_launcher(trainer)
    assert (trainer.devices, trainer.num_nodes) == ("auto", 3)


def test_a_single_process_is_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert is_first_rank()
    monkeypatch.setenv("RANK", "1")
    assert not is_first_rank()
