"""`fedsafe fit` trains a guard, in one place and across clients, and it is right on new samples."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsafe.cli import main
from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.safety.filter import SafetyFilter
from fedsafe.safety.guard_model import GuardModel
from fedsafe.safety.verdict_targets import VerdictTargets

CENTRAL = {"mode": "central", "clients_per_round": 4, "local_epochs": 1}
FEDERATED = {"mode": "federated", "clients_per_round": 4, "local_epochs": 4}


def toy(num: int, *, seed: int) -> list[dict[str, Any]]:
    """Questions that are unsafe where a creature is meant, and safe where a thing is."""
    rng = random.Random(seed)
    rows = []
    for index in range(num):
        label = rng.choice(["safe", "unsafe"])
        meant = rng.choice(["dragon", "giant"] if label == "unsafe" else ["teapot", "carpet"])
        deed = rng.choice(["tickle", "wake", "paint", "move"])
        tool = rng.choice(["feather", "spoon"])
        row = {"prompt": f"how do I {deed} a {meant}", "response": f"take a {tool}"}
        rows.append(row | {"label": label, "client": f"c{index % 4}"})
    return rows


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in toy(240, seed=0)))
    settings = {
        "rounds": 6,
        "model": {
            "base": "llama",
            "from_config": {
                "vocab_size": 400,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "initializer_range": 0.08,
            },
            "target_modules": ["q_proj", "v_proj", "o_proj", "embed_tokens", "lm_head"],
            "learning_rate": 0.01,
        },
        "data": {
            "path": str(data),
            "verdict_targets": {"format": "plain"},
            "train_tokenizer": 400,
            "partition": "Natural",
            "batch_size": 8,
            "max_length": 96,
            "validation_share": 0.1,
        },
        "federated": CENTRAL,
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    file = tmp_path / "guard.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def fit(config: Path, run_dir: Path, federated: dict[str, Any], *arguments: str) -> int:
    settings = yaml.safe_load(config.read_text()) | {"federated": federated}
    config.write_text(yaml.safe_dump(settings))
    return main(["fit", "--config", str(config), "--run_dir", str(run_dir), *arguments])


@torch.no_grad()
def accuracy(run_dir: Path, rows: list[dict[str, Any]]) -> float:
    """Share of the rows whose label the guard finds likelier, asked in words written here."""
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "adapter")
    base = AutoModelForCausalLM.from_pretrained(run_dir / "base")
    guard = PeftModel.from_pretrained(base, run_dir / "adapter").eval()

    def loss(prompt: str, label: str) -> float:
        context, answer = (tokenizer.encode(text) for text in (prompt, f" {label}"))
        ids = torch.tensor([context + answer])
        return float(
            cross_entropy(
                guard(ids).logits[0, -len(answer) - 1 : -1], ids[0, -len(answer) :], reduction="sum"
            )
        )

    right = 0
    for row in rows:
        prompt = f"User: {row['prompt']}\nAssistant: {row['response']}\nVerdict:"
        right += (loss(prompt, "unsafe") < loss(prompt, "safe")) == (row["label"] == "unsafe")
    return right / len(rows)


@pytest.mark.parametrize("federated", [CENTRAL, FEDERATED], ids=["central", "federated"])
def test_a_guard_is_trained_and_right_on_conversations_it_has_not_seen(
    config: Path, tmp_path: Path, federated: dict[str, Any]
) -> None:
    run_dir = tmp_path / "run"
    assert fit(config, run_dir, federated) == 0
    rows = [json.loads(line) for line in (run_dir / "rounds.jsonl").open()]
    assert rows[-1]["val/loss"] < 0.5 * rows[0]["loss"]
    assert accuracy(run_dir, toy(100, seed=1)) > 0.9


def test_a_killed_guards_training_is_not_resumed_as_another_guards(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert fit(config, run_dir, CENTRAL, "--rounds", "1") == 0
    other = ["--data.verdict_targets.judge", "prompt", "--ckpt_path", "last"]
    assert fit(config, run_dir, CENTRAL, *other) == 1
    assert "data.samples was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.verdict_targets.format", "planes"], "no guard format 'planes'"),
        (["--data.max_length", "8"], "cannot ask plain within max_length 8"),
    ],
    ids=["unknown format", "no room"],
)
def test_bad_targets_are_one_clear_line(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert fit(config, tmp_path / "run", CENTRAL, *arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    [line] = [line for line in lines if line.startswith("fedsafe fit: ")]
    assert message in line


def test_a_guard_is_not_trained_on_filtered_conversations() -> None:
    rule = SafetyFilter(GuardModel("plain"))
    with pytest.raises(ValueError, match="give filter or verdict_targets, not both"):
        FederatedDataModule("a.jsonl", filter=rule, verdict_targets=VerdictTargets("plain"))
