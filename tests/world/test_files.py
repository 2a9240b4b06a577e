import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fedsafe.world import files
from fedsafe.world.files import write_world
from fedsafe.world.generator import client_rows
from fedsafe.world.pretraining import pretrained_base

NAMES = {
    "clients.jsonl": 24,
    "red_team.jsonl": 48,
    "benign.jsonl": 48,
    "eval_harmful.jsonl": 150,
    "eval_benign.jsonl": 150,
    "eval_hhh.jsonl": 120,
    "guard.jsonl": 1200,
    "guard_test.jsonl": 600,
}


@pytest.fixture(autouse=True)
def hardly_trained_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(_: Path | None, *, seed: int) -> Path:
        return pretrained_base(tmp_path / "cache", seed=seed, num_steps=1)

    monkeypatch.setattr(files, "pretrained_base", quick)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_world_is_eight_files_refusals_and_a_base(tmp_path: Path):
    write_world(tmp_path / "world", num_clients=3, samples_per_client=8, seed=5)
    made = tmp_path / "world"
    assert {path.name for path in made.iterdir()} == {*NAMES, "refusals.txt", "base"}
    assert {name: len(rows(made / name)) for name in NAMES} == NAMES
    assert rows(made / "clients.jsonl") == client_rows(num_clients=3, samples_per_client=8, seed=5)
    assert AutoModelForCausalLM.from_pretrained(made / "base").config.n_layer == 3


def test_same_arguments_give_the_same_bytes_and_replace_other_ones(tmp_path: Path):
    write_world(tmp_path / "one", num_clients=2, samples_per_client=4)
    write_world(tmp_path / "other", num_clients=3, samples_per_client=4, harm_share=0.5, seed=1)
    assert contents(tmp_path / "one") != contents(tmp_path / "other")
    write_world(tmp_path / "other", num_clients=2, samples_per_client=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_killed_write_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world = tmp_path / "world"
    write_world(world, num_clients=2, samples_per_client=4)
    before = contents(world)

    def killed(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        write_world(world, num_clients=2, samples_per_client=4, seed=1)
    assert contents(world) == before
