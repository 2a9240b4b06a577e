import sys

import pytest
from lightning import Callback, Trainer

from fedsafe.federated.progress import RoundProgressBar
from fedsafe.federated.server_listener import RoundListener


class Terminal:
    """Standard output that says that somebody watches."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_in_a_terminal_the_bar_names_the_round_and_the_client(
    federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    federation(callbacks=(RoundProgressBar(),), trainer={"enable_progress_bar": True}).fit()
    for round_ in (1, 2):
        for client in (1, 2):
            assert f"round {round_}/2 · client {client}/2" in terminal.text
    assert "train/loss=" in terminal.text


def test_in_a_terminal_the_bar_says_who_is_awaited(
    federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asking(Callback):
        """Stands for rounds whose clients are elsewhere."""

        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RoundListener):
                    callback.on_clients_progress(trainer, "2 of 5 clients back")

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    shown = {"enable_progress_bar": True}
    federation(callbacks=(RoundProgressBar(), Asking()), trainer=shown).fit()
    assert "round 2/2 · 2 of 5 clients back" in terminal.text


def test_in_a_file_each_round_is_one_line(federation, capsys: pytest.CaptureFixture[str]) -> None:
    bar = RoundProgressBar()
    federation(
        callbacks=(bar,),
        trainer={"enable_progress_bar": True},
        data={"validation_share": 0.2},
    ).fit()
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line]
    assert [line.split(" · ")[0] for line in lines] == ["round 1/2", "round 2/2"]
    assert all("train/loss" in line and "val/loss" in line for line in lines)
    assert "it/s" not in captured.out + captured.err
