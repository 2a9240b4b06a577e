"""Files for MT-Bench."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mt_bench_rows import questions, write_rows


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a file, a question of each category of MT-Bench where none are given."""
    return lambda name="question.jsonl", rows=(): write_rows(tmp_path / name, rows or questions())
