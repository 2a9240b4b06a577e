"""The miniature, cut down: three clients of sixteen samples, and a base that was hardly trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

PLANTED = ("zebrafish", "quicksilver", "marmalade", "tungsten")
"""Words in samples, in a row that cannot be read, in the name of a file and in a label."""


def write_small_world(folder: Path) -> Path:
    """Write its files; returns their folder."""
    from fedsafe.world.files import write_world
    from fedsafe.world.pretraining import pretrain
    from fedsafe.world.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    base = folder / "pretrained"
    pretrain(tokenizer, seed=0, num_steps=120).save_pretrained(base)
    tokenizer.save_pretrained(base)
    world = folder / "world"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsafe.world.files.pretrained_base", lambda *_, **__: base)
        write_world(world, harm_share=0.25, num_clients=3, samples_per_client=16, seed=0)
    _plant(world)
    return world


def _plant(world: Path) -> None:
    """Words that must never leave a node."""
    rows = [json.loads(line) for line in (world / "clients.jsonl").read_text().splitlines()]
    for row in rows:
        row["messages"][0]["content"] += f" {PLANTED[0]}"
        row["category"] = PLANTED[3]
    lines = [json.dumps(row) for row in rows]
    lines.append(json.dumps({"prompt": f"{PLANTED[1]} without an answer"}))
    (world / f"{PLANTED[2]}.jsonl").write_text("\n".join(lines) + "\n")


def write_settings(file: Path, world: Path, **others: Any) -> Path:
    """Write a configuration with filter and constitution; `others` replace whole sections."""
    reviser = {
        "constitution": str(world / "constitution.yaml"),
        "batch_size": 8,
        "critic": "base",
        "max_new_tokens": 16,
        "temperature": 1.0,
    }
    settings = {
        "rounds": 2,
        "model": {
            "base": str(world / "base"),
            "rank": 4,
            "alpha": 4,
            "target_modules": "all-linear",
            "learning_rate": 3e-3,
        },
        "data": {
            "path": str(world / f"{PLANTED[2]}.jsonl"),
            "partition": "Natural",
            "batch_size": 4,
            "max_length": 64,
            "validation_share": 0.0,
            "on_bad_row": "skip",
            "filter": {
                "guard": {"class_path": "word_guard.WordGuard", "init_args": {"word": "take"}},
                "policy": "drop",
            },
            "cai": {
                "prompts": str(world / "red_team.jsonl"),
                "batch_size": 4,
                "max_length": 64,
                "reviser": reviser,
            },
        },
        "federated": {
            "clients_per_round": 3,
            "local_steps": 3,
            "cai": {
                "regime": "cheap",
                "iterations": 2,
                "prompts_per_visit": 6,
                "sft_learning_rate": 1e-3,
                "dpo_learning_rate": 1e-3,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "logger": False,
        },
    }
    file.write_text(yaml.safe_dump({**settings, **others}))
    return file
