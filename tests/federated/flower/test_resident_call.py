"""Who asks a resident trainer, and who starts it; the trainer here has no model."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import light_resident
import pytest

from fedsafe.federated.flower import resident_call
from fedsafe.federated.flower.node_file import Node
from fedsafe.federated.flower.private_line import call, folder_for
from fedsafe.federated.flower.resident_call import ResidentError, ask, stop
from fedsafe.federated.remote.letter import Letter

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residents are started from the script without a model."""

    def command(node: Node, node_file: Path) -> list[str]:
        return [sys.executable, light_resident.__file__, str(node_file)]

    monkeypatch.setattr(resident_call, "_command", command)
    monkeypatch.setattr(resident_call, "_GRACE_SECONDS", 1.0)


@pytest.fixture
def node_file(tmp_path: Path) -> Iterator[Path]:
    """A node with a configuration file, whose resident ends with the test."""
    file = tmp_path / "node.json"
    (tmp_path / "a.yaml").write_text("rounds: 3\n")
    set_up(file)
    yield file
    stop(file)


def set_up(file: Path, *arguments: str, **settings: Any) -> None:
    given = {"idle_seconds": 60.0, **settings}
    options = ["--config", "a.yaml", *arguments]
    Node("ada", options, cwd=str(file.parent), **given).write(file)


def asked(node_file: Path, *, timeout_seconds: float = 20, **facts: Any) -> int:
    """Ask something; the number of the process that answers."""
    given = ask(node_file, Letter({"kind": "x", **facts}, b"abc"), timeout_seconds=timeout_seconds)
    assert given.facts["said"] == {"kind": "x", **facts}
    assert given.tensors == b"abc"
    process: int = given.facts["process"]
    return process


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0]
    except FileNotFoundError:
        return False


def test_one_process_answers_call_after_call(node_file: Path) -> None:
    first = asked(node_file)
    assert asked(node_file) == asked(node_file) == first != os.getpid()
    assert os.getsid(first) == first  # whoever ends the group of the process that asks spares it
    folder = folder_for(node_file)
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()}
    assert set(modes.values()) == {0o600}
    assert modes.keys() >= {"socket", "key", "lock"}


def test_many_starters_at_once_start_one(node_file: Path) -> None:
    set_up(node_file, "slow")
    with ThreadPoolExecutor(6) as pool:
        processes = set(pool.map(lambda _: asked(node_file), range(6)))
    assert len(processes) == 1


def test_another_process_finds_it_and_imports_nothing_heavy(node_file: Path) -> None:
    process = asked(node_file)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fedsafe.federated.flower.resident_call import ask\n"
        "from fedsafe.federated.remote.letter import Letter\n"
        f"given = ask(Path({str(node_file)!r}), Letter({{'kind': 'x'}}), timeout_seconds=20)\n"
        "heavy = {'torch', 'numpy', 'lightning', 'transformers', 'flwr'} & set(sys.modules)\n"
        "print(given.facts['process'], sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{process} []"


def test_a_trainer_killed_over_a_letter_is_started_anew_and_asked_again(
    node_file: Path, tmp_path: Path
) -> None:
    first = asked(node_file)
    assert asked(node_file, once=str(tmp_path / "killed")) != first
    assert (tmp_path / "killed").exists()


def test_a_letter_that_kills_every_trainer_is_given_up(node_file: Path) -> None:
    with pytest.raises(ResidentError, match=r"died 2 times over one message; .*resident.log says"):
        asked(node_file, die=True)
    assert asked(node_file)


def test_what_a_killed_trainer_left_behind_is_no_hindrance(node_file: Path) -> None:
    first = asked(node_file)
    os.kill(first, signal.SIGKILL)
    assert (folder_for(node_file) / "socket").exists()
    assert asked(node_file) != first


@pytest.mark.parametrize("change", ["options", "configuration", "library"])
def test_a_node_set_up_anew_has_a_new_trainer(
    change: str, node_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = asked(node_file)
    if change == "options":
        set_up(node_file, "--model.rank", "8")
    elif change == "configuration":
        (node_file.parent / "a.yaml").write_text("rounds: 4\n")
    else:
        monkeypatch.setattr(resident_call, "version", lambda name: "99")
    second = asked(node_file)
    assert second != first
    assert not is_alive(first)
    assert asked(node_file) == second


def test_a_trainer_of_an_earlier_setting_is_ended_in_the_middle_of_a_visit(node_file: Path) -> None:
    first = asked(node_file)
    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(asked, node_file, sleep=60, timeout_seconds=4)
        time.sleep(0.3)
        set_up(node_file, "--model.rank", "8")
        second = asked(node_file)
        assert second != first
        assert not is_alive(first)
        with pytest.raises(ResidentError, match="did not answer within 4 seconds"):
            old.result()  # asked again, of the new trainer
        assert asked(node_file) == second


def test_many_who_find_a_trainer_of_an_earlier_setting_start_one(node_file: Path) -> None:
    first = asked(node_file)
    set_up(node_file, "slow")
    with ThreadPoolExecutor(6) as pool:
        processes = set(pool.map(lambda _: asked(node_file), range(6)))
    assert len(processes) == 1
    assert first not in processes


@pytest.mark.parametrize(
    ("argument", "why"),
    [("fail", "there is no base"), ("crash", "ZeroDivisionError: of the crash")],
)
def test_a_trainer_that_cannot_start_says_why(argument: str, why: str, node_file: Path) -> None:
    set_up(node_file, argument)
    for _ in range(2):  # nothing of the first try is in the way of the second
        with pytest.raises(ResidentError, match=f"the trainer could not be started: {why}$"):
            asked(node_file)
    assert why in (node_file.parent / "resident.log").read_text()
    set_up(node_file)
    assert asked(node_file)


def test_of_ranks_that_cannot_start_the_first_reason_is_told(
    node_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*started, light_resident.__file__, str(node_file)]
    monkeypatch.setattr(resident_call, "_command", lambda node, node_file: command)
    set_up(node_file, "fail")
    with pytest.raises(ResidentError, match=r"the trainer could not be started: there is no base$"):
        asked(node_file, timeout_seconds=100)


def test_several_ranks_are_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    node = Node("ada", [], cwd="/home", num_ranks=4)
    command = resident_call._command(node, Path("/node.json"))
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    assert command[5:] == ["-m", "fedsafe.federated.flower.resident", "/node.json"]


def test_a_trainer_ends_when_nobody_has_asked_for_a_while(node_file: Path) -> None:
    set_up(node_file, idle_seconds=0.5)
    first = asked(node_file)
    for _ in range(3):
        time.sleep(0.3)
        assert asked(node_file) == first
    deadline = time.monotonic() + 10
    while is_alive(first):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (folder_for(node_file) / "socket").exists()
    assert asked(node_file) != first


def test_calls_are_answered_one_after_another(node_file: Path) -> None:
    asked(node_file)
    with ThreadPoolExecutor(3) as pool:
        started = time.monotonic()
        assert len(set(pool.map(lambda _: asked(node_file, sleep=0.3), range(3)))) == 1
    assert time.monotonic() - started > 0.85


def test_a_visit_whose_caller_has_left_makes_way(node_file: Path) -> None:
    first = asked(node_file)
    with pytest.raises(ResidentError, match=r"did not answer within 0.5 seconds; .* says more"):
        asked(node_file, sleep=30, timeout_seconds=0.5)
    started = time.monotonic()
    assert asked(node_file) == first
    assert time.monotonic() - started < 2


def test_a_trainer_that_hangs_is_ended(node_file: Path) -> None:
    first = asked(node_file)
    with pytest.raises(ResidentError, match=r"did not answer within 0.5 seconds"):
        asked(node_file, freeze=True, timeout_seconds=0.5)
    assert asked(node_file) != first
    assert not is_alive(first)


def test_stopping_ends_a_trainer_that_is_ready_busy_or_starting(node_file: Path) -> None:
    stop(node_file)  # there is none
    ready = asked(node_file)
    folder = folder_for(node_file)
    stop(node_file)
    assert not is_alive(ready)
    assert not folder.exists()
    set_up(node_file, "slow")
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(asked, node_file)
        time.sleep(0.3)
        stop(node_file)
        with pytest.raises(ResidentError, match="could not be started"):
            starting.result()


def test_a_caller_without_the_key_changes_nothing(node_file: Path) -> None:
    process = asked(node_file)
    with pytest.raises(EOFError):
        call(folder_for(node_file) / "socket", b"x" * 32, time.monotonic() + 5)
    assert asked(node_file) == process


def test_bytes_that_are_no_letter_change_nothing(node_file: Path) -> None:
    process, folder = asked(node_file), folder_for(node_file)
    with call(folder / "socket", (folder / "key").read_bytes(), time.monotonic() + 5) as line:
        line.send_bytes(b"\x80\x04no letter")
        with pytest.raises(EOFError):
            line.recv_bytes()
    assert asked(node_file) == process


def test_a_file_that_describes_no_node_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "node.json"
    with pytest.raises(ValueError, match=r"node.json does not describe a node \(.*start it with"):
        ask(file, Letter({}), timeout_seconds=1)
    file.write_text('{"name": "ada"}')
    with pytest.raises(ValueError, match="does not describe a node"):
        ask(file, Letter({}), timeout_seconds=1)


def test_the_configurations_of_a_node_are_found_in_its_options() -> None:
    arguments = ["--config", "a.yaml", "--config=b/b.yaml", "-c", "/c.yaml", "--model.rank", "3"]
    node = Node("ada", arguments, cwd="/home")
    assert node.configs() == [Path("/home/a.yaml"), Path("/home/b/b.yaml"), Path("/c.yaml")]
