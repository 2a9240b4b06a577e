"""Processes that end with their owner, however that one ends."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedsafe.federated.flower.processes import Leashed, without_proxy

# starts a child, tells the numbers of both, and sleeps
FAMILY = """\
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
OWNER = """\
import sys, time
from pathlib import Path
from fedsafe.federated.flower.processes import Leashed, without_proxy
kept = Leashed([sys.executable, "-c", sys.argv[1]], environment={}, log=Path(sys.argv[2]))
time.sleep(600)
"""


def started(log: Path) -> list[psutil.Process]:
    """The processes that a log tells of."""
    until = time.monotonic() + 30
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < until
        time.sleep(0.05)
    return [psutil.Process(int(number)) for number in log.read_text().split()]


def all_end(processes: list[psutil.Process], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(each.is_running() and each.status() != "zombie" for each in processes):
            return True
        time.sleep(0.05)
    return False


def test_all_of_it_ends_when_it_is_stopped(tmp_path: Path) -> None:
    leashed = Leashed([sys.executable, "-c", FAMILY], environment={}, log=tmp_path / "log")
    processes = started(tmp_path / "log")
    assert leashed.poll() is None
    leashed.stop()
    assert all_end(processes, 5)


@pytest.mark.distributed
def test_all_of_it_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, FAMILY, str(tmp_path / "log")])
    processes = started(tmp_path / "log")
    owner.kill()
    owner.wait()
    assert all_end(processes, 10)


def test_what_it_left_behind_ends_with_it(tmp_path: Path) -> None:
    leaving = FAMILY.rpartition("time.sleep")[0] + "time.sleep(1)\n"
    leashed = Leashed([sys.executable, "-c", leaving], environment={}, log=tmp_path / "log")
    assert all_end(started(tmp_path / "log"), 10)
    leashed.stop()


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("", 0)])
def test_its_exit_status_is_told(code: str, status: int, tmp_path: Path) -> None:
    leashed = Leashed([sys.executable, "-c", code], environment={}, log=tmp_path / "log")
    until = time.monotonic() + 30
    while leashed.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert leashed.poll() == status
    leashed.stop()


def test_its_log_is_kept_and_its_last_words_are_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "import os, sys; print(os.environ['WORD']); sys.exit('the end')"
    leashed = Leashed([sys.executable, "-c", code], environment={"WORD": "given"}, log=log)
    until = time.monotonic() + 30
    while leashed.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    leashed.stop()
    assert leashed.log_end() == "before\ngiven\nthe end\n"
    assert leashed.last_words() == "the end"


def test_flower_reports_nothing_home_and_its_commands_are_found(tmp_path: Path) -> None:
    code = "import os, shutil; print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['PATH'])"
    leashed = Leashed([sys.executable, "-c", code], environment={}, log=tmp_path / "log")
    until = time.monotonic() + 30
    while leashed.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    leashed.stop()
    assert leashed.last_words().startswith(f"0 {Path(sys.executable).parent}")


def test_a_proxy_of_the_environment_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.delenv("no_proxy", raising=False)
    expected = "intranet,127.0.0.1,localhost,::1,10.0.0.1"
    assert without_proxy("10.0.0.1") == {"NO_PROXY": expected, "no_proxy": expected}


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path) -> None:
    code = "print('begin ' + 'x' * 100_000 + ' end')"
    leashed = Leashed([sys.executable, "-c", code], environment={}, log=tmp_path / "log")
    until = time.monotonic() + 30
    while leashed.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    leashed.stop()
    assert leashed.log_end().endswith("x end\n")
    assert len(leashed.log_end()) < 20_000
