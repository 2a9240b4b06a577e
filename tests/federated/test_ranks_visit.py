"""The server visit on two ranks, under DDP and with clients in parallel, against one process."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from round_rows import without_seconds
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
from visit_cases import (  # found once its folder is known
    CASES,
    RESUMED,
    STRATEGIES,
    break_off,
    run_cases,
    write_files,
)

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

ALL = [*((kind, case) for kind in STRATEGIES for case in CASES)]
ALL += [("ddp", RESUMED), ("fsdp", RESUMED)]


class Runs(NamedTuple):
    """Where the runs of all cases are."""

    one: Path
    """In one process."""
    two: Path
    """On two ranks, in a folder for each strategy."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, conversations: Path) -> Runs:
    folder = tmp_path_factory.mktemp("visits")
    write_files(folder)
    script = Path(__file__).with_name("visit_cases.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSAFE_CACHE", str(folder / "cache-two"))
        run_ranks(script, folder, tiny_gpt2, conversations, timeout_seconds=500)
        patch.setenv("FEDSAFE_CACHE", str(folder / "cache-one"))
        settings: Any = {"base": tiny_gpt2, "path": conversations, "strategy": None}
        run_cases(folder / "one", **settings)
    return Runs(folder / "one", folder)


def adapter_of(run: Path) -> Tensor:
    return torch.load(run / "adapter.pt", weights_only=True)


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "rounds.jsonl").read_text().splitlines()
    return [without_seconds(json.loads(line)) for line in lines]


@pytest.mark.parametrize(("strategy", "case"), ALL)
def test_two_ranks_train_what_one_process_trains(runs: Runs, strategy: str, case: str) -> None:
    one, two = adapter_of(runs.one / case), adapter_of(runs.two / strategy / case)
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("strategy", "case"), ALL)
def test_two_ranks_make_the_pairs_of_one_process(runs: Runs, strategy: str, case: str) -> None:
    one, two = (
        {file.name: file.read_text() for file in (folder / case / "pairs").glob("*")}
        for folder in (runs.one, runs.two / strategy)
    )
    assert one == two
    assert bool(one) == ("made" in case or case in ("adaptive", RESUMED))


@pytest.mark.parametrize(("strategy", "case"), ALL)
def test_two_ranks_tell_the_same_story(runs: Runs, strategy: str, case: str) -> None:
    one, two = rows_of(runs.one / case), rows_of(runs.two / strategy / case)
    assert len(one) == len(two) == 2
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        assert _rounded(ours.get("cai")) == _rounded(theirs.get("cai"))
        assert ours.get("cai_before") == theirs.get("cai_before")
        if "val/loss" in ours:
            assert theirs["val/loss"] == pytest.approx(ours["val/loss"], rel=1e-6)


def test_a_step_that_leaves_no_adapter_ends_the_visit_on_all_ranks(
    runs: Runs, tmp_path: Path, tiny_gpt2: Path, conversations: Path
) -> None:
    write_files(tmp_path)
    told = break_off(tmp_path / "one", base=tiny_gpt2, path=conversations, strategy=None)
    assert "step 1 of the server's sft in round 1 leaves an adapter that is not finite" in told
    expected = told.replace(str(tmp_path), str(runs.two))
    for rank in range(2):
        assert (runs.two / "clients" / f"broken-{rank}.txt").read_text() == expected


def test_the_visits_did_something(runs: Runs) -> None:
    """Else the tests above compare nothing."""
    visits = {
        case: [row["cai"] for row in rows_of(runs.one / case)]
        for case in CASES
        if case != "filtered"
    }
    assert all(visit["sft_steps"] and visit["dpo_steps"] for visit in visits["ready"])
    assert any(visit["pairs"] for visit in visits["made"])
    assert [visit["refusal_rate_before"] for visit in visits["adaptive"]]


@pytest.mark.parametrize("name", ["filter.jsonl", "filter.json", "rejected.jsonl"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_write_the_verdicts_of_one_process(runs: Runs, strategy: str, name: str) -> None:
    one, two = (
        (folder / "filtered" / name).read_text() for folder in (runs.one, runs.two / strategy)
    )
    assert one == two
    assert one


def _rounded(visit: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a visit did and cost; its losses to five digits."""
    if visit is None:
        return None
    return {n: float(f"{x:.4e}") if isinstance(x, float) else x for n, x in visit.items()}
