import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from fedsafe import __version__, cli
from fedsafe.cli import COMMANDS, main

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command_and_how_to_debug(arguments: list[str], capsys: Captured) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert f"  {name}" in out
        assert text in out
    assert "FEDSAFE_DEBUG=1" in out


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedsafe {__version__}\n"


def test_an_unknown_command_is_named_with_those_there_are(capsys: Captured) -> None:
    assert main(["train"]) == 2
    assert "fedsafe has no command 'train'; it has fit, validate," in capsys.readouterr().err


def test_help_comes_within_a_second() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        command = [sys.executable, "-m", "fedsafe", "--help"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 1


def test_the_exit_status_reaches_the_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedsafe", "nonsense"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no command 'nonsense'" in done.stderr


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Make every command raise an error."""

    def raises(error: BaseException) -> None:
        def run(name: str, arguments: list[str]) -> None:
            raise error

        module = SimpleNamespace(run=run, name_slurm_tasks=lambda: None)
        monkeypatch.setattr(cli, "import_module", lambda name: module)

    monkeypatch.delenv("FEDSAFE_DEBUG", raising=False)
    return raises


@pytest.mark.parametrize("error", [ValueError("rank is 0; give 1"), OSError("rank is 0; give 1")])
def test_errors_of_users_are_one_line(command, capsys: Captured, error: Exception) -> None:
    command(error)
    assert main(["table"]) == 1
    assert capsys.readouterr().err == "fedsafe table: rank is 0; give 1\n"


def test_errors_of_ours_keep_their_trace(command) -> None:
    command(AssertionError("a bug"))
    with pytest.raises(AssertionError, match="a bug"):
        main(["table"])


def test_debugging_raises(command, monkeypatch: pytest.MonkeyPatch) -> None:
    command(ValueError("rank is 0"))
    monkeypatch.setitem(os.environ, "FEDSAFE_DEBUG", "1")
    with pytest.raises(ValueError, match="rank is 0"):
        main(["table"])


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("table", "; the same command goes on where it stopped"),
        ("filter", "; the same command goes on: verdicts are kept"),
        ("fit", "; the same command with --ckpt_path last goes on from the last finished round"),
        ("export", ""),
    ],
)
def test_an_interrupt_exits_with_130(command, capsys: Captured, name: str, how: str) -> None:
    command(KeyboardInterrupt())
    assert main([name]) == 130
    assert capsys.readouterr().err == f"\nfedsafe {name} was interrupted{how}\n"


@pytest.mark.parametrize(
    "said",
    [
        "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711\nand more",
        "Timed out waiting 60000ms for recv operation to complete",
        "NCCL communicator was aborted on rank 1.",
    ],
    ids=["closed", "timed out", "nccl"],
)
def test_the_loss_of_a_rank_is_one_line_that_says_how_to_go_on(
    command, capsys: Captured, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    command(RuntimeError(said))
    assert main(["fit"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"fedsafe fit (rank 1): another rank is gone ({said.splitlines()[0]})")
    assert "--ckpt_path last" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("world_size", "said"), [("1", "Connection closed by peer"), ("2", "shapes do not match")]
)
def test_other_runtime_errors_keep_their_trace(
    command, monkeypatch: pytest.MonkeyPatch, world_size: str, said: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    command(RuntimeError(said))
    with pytest.raises(RuntimeError, match=said):
        main(["fit"])


def test_errors_name_the_rank_unless_it_is_the_first(
    command, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(ValueError("rank is 0"))
    for rank, named in (("0", ""), ("3", " (rank 3)")):
        monkeypatch.setenv("RANK", rank)
        main(["table"])
        assert capsys.readouterr().err == f"fedsafe table{named}: rank is 0\n"


def test_a_command_that_ranks_cannot_share_refuses_several(
    command, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(AssertionError("started all the same"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["export"]) == 1
    assert (
        "fedsafe export: it runs in one process; start it without torchrun"
        in capsys.readouterr().err
    )
