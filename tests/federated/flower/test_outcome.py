import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsafe.federated.flower.outcome import Outcome, has_ended, write_process


def test_an_outcome_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Outcome.read(tmp_path) is None
    outcome = Outcome(1, "rounds is 0; give 1 or more")
    outcome.write(tmp_path)
    assert Outcome.read(tmp_path) == outcome
    assert [file.name for file in tmp_path.iterdir()] == ["outcome.json"]


def test_a_process_that_lives_has_not_ended(tmp_path: Path) -> None:
    assert not has_ended(tmp_path)
    write_process(tmp_path)
    assert (tmp_path / "process").read_text() == str(os.getpid())
    assert not has_ended(tmp_path)


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_process_that_was_killed_has_ended(waited_for: bool, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (tmp_path / "process").write_text(str(process.pid))
    assert not has_ended(tmp_path)
    process.kill()
    if waited_for:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent is busy
    assert has_ended(tmp_path)
    process.wait()


def test_a_number_that_is_not_all_there_yet_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "process").touch()
    assert not has_ended(tmp_path)
