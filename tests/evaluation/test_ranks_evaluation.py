"""`fedsafe test` and the safety probe on two ranks, under each strategy, against one process."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ranks import run_ranks
from round_rows import without_seconds

from fedsafe.data import loaders

sys.path.append(str(Path(__file__).parent))
from shared_evaluations import (  # found once its folder is known
    SIZES,
    STRATEGIES,
    run_all,
    write_inputs,
)

pytestmark = pytest.mark.distributed


class Runs(NamedTuple):
    """The run in one process, and the folder of those on two ranks."""

    one: Path
    two: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> Runs:
    folder = tmp_path_factory.mktemp("evaluations")
    write_inputs(folder, tiny_gpt2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "_EVALUATION_TOKENS", loaders._EVALUATION_TOKENS)
        patch.setenv("FEDSAFE_CACHE", str(folder / "cache-one"))
        patch.setenv("ASKED", "")
        run_all(folder / "one", None, None)
    run_ranks(Path(__file__).with_name("shared_evaluations.py"), folder)
    return Runs(folder / "one", folder)


@pytest.mark.parametrize("benchmark", SIZES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_write_the_records_of_one_process(
    runs: Runs, strategy: str, benchmark: str
) -> None:
    name = f"replies/{benchmark}.jsonl"
    expected = (runs.one / name).read_text()
    assert (runs.two / strategy / name).read_text() == expected
    assert len(expected.splitlines()) == SIZES[benchmark]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_measure_what_one_process_measures(runs: Runs, strategy: str) -> None:
    one, two = (
        json.loads((folder / "results.json").read_text())
        for folder in (runs.one, runs.two / strategy)
    )
    assert two.pop("test/loss") == pytest.approx(one.pop("test/loss"), rel=1e-6)
    assert one == two
    assert {name.split("/")[1] for name in one} == set(SIZES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_probe_finds_the_same_on_two_ranks(runs: Runs, strategy: str) -> None:
    one, two = ((folder / "before.json").read_text() for folder in (runs.one, runs.two / strategy))
    assert one == two
    (ours,), (theirs,) = _rows(runs.one), _rows(runs.two / strategy)
    assert theirs["val/loss"] == pytest.approx(ours["val/loss"], rel=1e-5)
    probed = [name for name in ours if name.startswith(("val/prompts", "val/few", "val/xstest"))]
    assert len(probed) == 3 + 2 + 4
    assert {name: theirs[name] for name in probed} == {name: ours[name] for name in probed}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_judge_is_asked_each_question_once(runs: Runs, strategy: str) -> None:
    """By the replica that has it; where ranks hold one replica together, by the first of them."""
    asked = [
        file.read_text().split() if file.exists() else []
        for file in (runs.two / f"{strategy}.asked-{rank}" for rank in range(2))
    ]
    alone = (runs.two / "one.asked-alone").read_text().split()
    assert sorted(asked[0] + asked[1]) == sorted(alone)
    assert len(alone) == 2 * SIZES["mt_bench"]
    assert bool(asked[1]) == (strategy != "fsdp")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_was_tested_is_told_alike(runs: Runs, strategy: str) -> None:
    one, two = (
        json.loads((folder / "tested.json").read_text())
        for folder in (runs.one, runs.two / strategy)
    )
    assert one.keys() == two.keys()
    assert {each["digest"] for each in two.values()} == {each["digest"] for each in one.values()}


def _rows(run: Path) -> list[dict[str, Any]]:
    return [without_seconds(json.loads(line)) for line in (run / "rounds.jsonl").open()]
