"""Clients in parallel on two ranks give what one process gives, one client after another."""

import json
import shutil
from pathlib import Path
from typing import Any

import parallel_runs
import pytest
import torch
from parallel_runs import CASES, RESUMED
from ranks import run_ranks
from round_rows import without_seconds
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

EXCHANGES = ("updates", "sums")


def adapters(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every adapter that a run wrote."""
    files = sorted(folder.glob("adapter*/**/adapter_model.safetensors"))
    return {
        f"{file.parent.name}/{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [without_seconds(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, conversations: Path) -> Path:
    """Folder of every run in one process, and on two ranks with both exchanges."""
    folder = tmp_path_factory.mktemp("runs")

    def one(run: Path) -> None:
        made = parallel_runs.make(
            run.name, None, base=tiny_gpt2, conversations=conversations, folder=run
        )
        parallel_runs.fit(made)

    for name in CASES:
        one(folder / "one" / name)
    shutil.copytree(folder / "one" / RESUMED, folder / "from-one" / "updates" / RESUMED)
    named = [f"{exchange}/{name}" for exchange in EXCHANGES for name in CASES]
    named.append(f"from-one/updates/{RESUMED}")
    run_ranks(parallel_runs.__file__, tiny_gpt2, conversations, folder, *named)
    shutil.copytree(folder / "updates" / RESUMED, folder / "from-two" / RESUMED)
    one(folder / "from-two" / RESUMED)
    return folder


def assert_same(run: Path, expected: Path) -> None:
    """The same adapters and records, bit for bit."""
    ours, theirs = adapters(run), adapters(expected)
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[each], theirs[each]) for each in ours)
    assert rows(run) == rows(expected)


@pytest.mark.parametrize("name", CASES)
def test_exchanged_updates_make_the_run_of_one_process_bit_for_bit(runs: Path, name: str) -> None:
    assert_same(runs / "updates" / name, runs / "one" / name)


@pytest.mark.parametrize("name", CASES)
def test_exchanged_sums_make_the_run_of_one_process_to_rounding(runs: Path, name: str) -> None:
    ours, expected = adapters(runs / "sums" / name), adapters(runs / "one" / name)
    assert ours.keys() == expected.keys() != set()
    for each in ours:
        torch.testing.assert_close(ours[each], expected[each], atol=1e-6, rtol=0)
    own, others = rows(runs / "sums" / name), rows(runs / "one" / name)
    assert [names_of(row) for row in own] == [names_of(row) for row in others]
    assert [row["loss"] for row in own] == pytest.approx([row["loss"] for row in others], rel=1e-5)


def names_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The clients of a round, in order, and what became of them."""
    return [(client["client"], client["status"]) for client in row["clients"]]


def test_a_client_whose_update_is_refused_is_told_as_in_one_process(runs: Path) -> None:
    for row in rows(runs / "sums" / "refused"):
        told = {client["client"]: client.get("reason") for client in row["clients"]}
        assert told == {
            "ada": None,
            "bob": "1 of 4096 values are not finite",
            "cyd": None,
            "dee": None,
        }


@pytest.mark.parametrize("start", ["from-one/updates", "from-two"])
def test_a_run_goes_on_with_another_number_of_ranks_bit_for_bit(runs: Path, start: str) -> None:
    assert_same(runs / start / RESUMED, runs / "one" / RESUMED)


def test_ranks_speak_no_more_often_in_a_round_of_more_steps(runs: Path) -> None:
    short, long = (
        json.loads((runs / "sums" / case / parallel_runs.MESSAGES).read_text())
        for case in ("fedavg-3", "twice-the-steps")
    )
    assert short["all_reduce"] > 0
    assert long == short
