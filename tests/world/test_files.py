import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fedsafe.data.pairs import load_pairs
from fedsafe.data.prompts import load_prompts
from fedsafe.safety.constitution import Constitution, load_constitution
from fedsafe.safety.refusal_openings import opens_with
from fedsafe.world import files
from fedsafe.world.files import write_world
from fedsafe.world.generator import client_rows
from fedsafe.world.grammar import load_grammar
from fedsafe.world.pretraining import pretrained_base

NAMES = {
    "clients.jsonl": 24,
    "red_team.jsonl": 400,
    "benign.jsonl": 48,
    "helpful.jsonl": 96,
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


def test_world_is_nine_files_refusals_a_constitution_and_a_base(tmp_path: Path):
    write_world(tmp_path / "world", num_clients=3, samples_per_client=8, seed=5)
    made = tmp_path / "world"
    assert {path.name for path in made.iterdir()} == {
        *NAMES,
        "refusals.txt",
        "constitution.yaml",
        "base",
    }
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


@pytest.fixture
def constitution(tmp_path: Path) -> Constitution:
    path = tmp_path / "constitution.yaml"
    path.write_text(files.constitution_text())
    return load_constitution(str(path))


def test_constitution_has_the_principles_the_base_was_trained_with(constitution: Constitution):
    assert constitution.principles == load_grammar().principles


def test_gate_knows_how_the_base_calls_an_answer_harmful_and_harmless(constitution: Constitution):
    assert constitution.gate is not None
    assert constitution.gate.request is None
    critiques = load_grammar().critiques
    assert opens_with(critiques["harmful"], constitution.gate.flagged)
    assert not opens_with(critiques["harmless"], constitution.gate.flagged)


def test_constitution_and_helpful_pairs_are_in_words_of_the_base(
    constitution: Constitution, tokenizer: PreTrainedTokenizerFast
):
    rows = files.helpful_pairs(num_pairs=files.NUM_HELPFUL)
    texts = [row[name] for row in rows for name in ("prompt", "chosen", "rejected")]
    texts += [text for principle in constitution.principles for text in principle[1:]]
    assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in texts)


def test_prompts_and_pairs_are_read_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    write_world(tmp_path / "world", num_clients=1, samples_per_client=4)
    assert len(load_prompts(str(tmp_path / "world" / "red_team.jsonl"))) == 400
    pairs = load_pairs(str(tmp_path / "world" / "helpful.jsonl"), need_rejected=True)
    assert len({str(pair.prompt) for pair in pairs}) == 96
    assert not [each for each in recwarn if "not read" in str(each.message)]
