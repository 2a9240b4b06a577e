"""`filter`, `measure` and `revise` on two ranks write what they write in one process."""

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from thread_peers import together

from fedsafe.cli import main
from fedsafe.commands.noise import quiet_known_noise
from fedsafe.commands.ranks import _take_gpu, check_agreed, joined

sys.path.append(str(Path(__file__).parent))
from shared_commands import run_all, write_inputs  # found once its folder is known

HERE = Path(__file__).parent


class Told(NamedTuple):
    """What became of a command."""

    failed: bool
    out: str
    wrong: str


class Outcome(NamedTuple):
    """What the commands did in one process, and on two ranks."""

    one: Path
    two: Path
    told: list[Told]
    told_ranks: list[list[Told]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Outcome:
    folder = tmp_path_factory.mktemp("commands")
    one, two = folder / "one", folder / "two"
    for each in (one, two):
        each.mkdir()
        write_inputs(each)
    run_ranks(HERE / "shared_commands.py", two, tiny_llama)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSAFE_CACHE", str(one / "cache"))
        told = [Told(*each) for each in run_all(one, tiny_llama)]
    ranks = [json.loads((two / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return Outcome(one, two, told, [[Told(*each) for each in rank] for rank in ranks])


FILES = [
    *(f"kept{name}.jsonl" for name in ("", ".rejected", ".filter", ".bad")),
    *(f"refused{name}.jsonl" for name in ("", ".rejected", ".filter", ".bad")),
    *("m/guards.json", "m/guards.md", "m/precision_recall.png"),
    *("pairs.jsonl", "pairs.rejected.jsonl"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("name", FILES)
def test_two_ranks_write_the_files_of_one_process(outcome: Outcome, name: str) -> None:
    one, two = (
        (folder / name).read_bytes().replace(str(folder).encode(), b"FOLDER")
        for folder in (outcome.one, outcome.two)
    )
    assert one == two
    assert one or name in ("refused.rejected.jsonl", "pairs.jsonl")


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["kept", "refused", "pairs"])
def test_two_ranks_count_what_one_process_counts(outcome: Outcome, name: str) -> None:
    one, two = (
        _without_times(json.loads((folder / f"{name}.summary.json").read_text()), folder)
        for folder in (outcome.one, outcome.two)
    )
    assert one == two


@pytest.mark.distributed
def test_two_ranks_leave_no_other_files(outcome: Outcome) -> None:
    one, two = (
        {str(file.relative_to(folder)) for file in folder.rglob("*")}
        for folder in (outcome.one, outcome.two)
    )
    assert one == two - {"rank-0.json", "rank-1.json"}


@pytest.mark.distributed
def test_the_first_rank_prints_and_all_end_alike(outcome: Outcome) -> None:
    first, second = outcome.told_ranks
    failed = [told.failed for told in outcome.told]
    assert failed == [False, True, True, False, False, False, True]
    assert [told.failed for told in first] == [told.failed for told in second] == failed
    assert {told.out for told in second} == {""}
    for ours, theirs in zip(outcome.told, first, strict=True):
        assert _without_numbers(ours.out, outcome.one) == _without_numbers(theirs.out, outcome.two)


@pytest.mark.distributed
def test_all_ranks_name_what_is_wrong(outcome: Outcome) -> None:
    for ours, *theirs in zip(outcome.told, *outcome.told_ranks, strict=True):
        for each in theirs:
            message = ours.wrong.replace(str(outcome.one), "FOLDER")
            assert each.wrong.replace(str(outcome.two), "FOLDER") == message


@pytest.mark.distributed
def test_killed_on_two_ranks_and_run_again_gives_the_files_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{n}", "response": "dragon" if n % 5 == 0 else "goose"} for n in range(900)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def given(name: str) -> list[str]:
        monkeypatch.setenv("FEDSAFE_CACHE", str(tmp_path / name / "cache"))
        output = tmp_path / name / "kept.jsonl"
        guard = "--guard=stub_guards.WordGuard"
        return ["filter", guard, f"--input={source}", f"--output={output}"]

    arguments = given("killed")
    with monkeypatch.context() as patch:
        patch.setenv("JUDGED", str(tmp_path / "judged"))
        patch.setenv("KILL_AFTER", "600")  # one of the two ranks, in its first window
        assert run_ranks("-m", "fedsafe", *arguments, check=False).returncode == 1
    assert not (tmp_path / "killed/kept.jsonl").exists()
    run_ranks("-m", "fedsafe", *arguments)
    assert main(given("whole")) == 0
    for name in ("kept.jsonl", "kept.rejected.jsonl", "kept.filter.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def _without_times(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    del summary["seconds"]
    summary.pop("rows_per_second", None)
    summary.pop("prompts_per_second", None)
    return {
        name: value.replace(str(folder), "FOLDER") if isinstance(value, str) else value
        for name, value in summary.items()
    }


def _without_numbers(text: str, folder: Path) -> str:
    """What was printed, without times and white space that depend on them."""
    without = re.sub(r"[\d.,]+ (s|rows/s|prompts/s)\b", "", text.replace(str(folder), "FOLDER"))
    return re.sub(r"[\s─-╿]+", " ", without)


# ---- without starting ranks ----------------------------------------------------------------------


def test_a_command_that_torchrun_did_not_start_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as peers:
        assert (peers.index, peers.size) == (0, 1)
    assert not torch.distributed.is_initialized()


def test_a_rank_without_a_gpu_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 2 of this machine has no GPU .* 2 are visible"):
        _take_gpu(2, 2)


def test_ranks_that_see_different_files_are_refused() -> None:
    def check(peers: Any) -> None:
        check_agreed(peers, "numbers of rows in a.jsonl", 1000 + peers.index)

    with pytest.raises(ValueError, match=r"rows in a.jsonl \(1,000 on rank 0, 1,001 on rank 1\)"):
        together(2, check)


@pytest.mark.parametrize(("rank", "num"), [("0", 1), ("1", 0)], ids=["first", "another"])
def test_only_the_first_rank_warns_of_the_data(
    monkeypatch: pytest.MonkeyPatch, rank: str, num: int
) -> None:
    monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_known_noise()
        warnings.warn_explicit("a row", UserWarning, "a.py", 1, module="fedsafe.data.sources")
        warnings.warn_explicit("a judge", UserWarning, "b.py", 1, module="fedsafe.evaluation.judge")
    assert len([each for each in caught if str(each.message) == "a row"]) == num
    assert len([each for each in caught if str(each.message) == "a judge"]) == 1
