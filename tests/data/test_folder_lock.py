"""A folder that one process at a time works in."""

import threading
from pathlib import Path

import pytest

from fedsafe.data.folder_lock import only_here

TABLE = {"who": "fedsafe table", "option": "--output"}


def test_a_folder_is_one_tables_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with (
        only_here(folder, **TABLE),
        pytest.raises(
            ValueError, match=r"another fedsafe table is at work in .*; wait for it, or .* --output"
        ),
        only_here(folder, **TABLE),
    ):
        pytest.fail("two are in the folder")
    with only_here(folder, **TABLE):
        pass


def test_one_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with only_here(tmp_path, **TABLE):
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=stay)
    other.start()
    inside.wait(10)
    threading.Timer(0.3, leave.set).start()
    with only_here(tmp_path, **TABLE, patience_seconds=10):
        assert leave.is_set()
    other.join()
