"""The server visit on two ranks under DeepSpeed's ZeRO, against one process."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

sys.path.append(str(Path(__file__).parent))
from visit_cases import (  # found once its folder is known
    RESUMED,
    ZERO,
    ZERO_CASES,
    run_cases,
    write_files,
)

pytest.importorskip("deepspeed")

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, conversations: Path) -> Path:
    """Folder of the runs of all cases: in `one` process, and under each stage."""
    folder = tmp_path_factory.mktemp("zero-visits")
    write_files(folder)
    run_ranks(Path(__file__).with_name("visit_cases.py"), folder, tiny_gpt2, conversations, "zero")
    settings: Any = {"base": tiny_gpt2, "path": conversations, "strategy": None}
    run_cases(folder / "one", cases=ZERO_CASES, **settings)
    return folder


@pytest.mark.parametrize("case", [*ZERO_CASES, RESUMED])
@pytest.mark.parametrize("stage", ZERO)
def test_two_ranks_train_what_one_process_trains(runs: Path, stage: str, case: str) -> None:
    one, two = (
        torch.load(runs / kind / case / "adapter.pt", weights_only=True) for kind in ("one", stage)
    )
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", ZERO)
def test_two_ranks_make_the_pairs_of_one_process(runs: Path, stage: str) -> None:
    one, two = (
        {file.name: file.read_text() for file in (runs / kind / RESUMED / "pairs").iterdir()}
        for kind in ("one", stage)
    )
    assert one == two != {}
