"""A tiny federation that trains in a fraction of a second, and one call that runs it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import Federation, build_federation
from torch import Tensor

CLIENT_SIZES = {"ada": 9, "bob": 4, "cyd": 7, "dee": 6}
"""Samples of each client; with batches of 3, the last batch of some passes is smaller."""


FederationMaker = Callable[..., Federation]


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of short conversations of four clients of different sizes."""
    rng = random.Random(0)
    words = ["red", "blue", "green", "cat", "dog", "sun", "moon"]

    def sample(client: str) -> dict[str, str]:
        prompt, response = (" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(2))
        return {"prompt": prompt, "response": response, "client": client}

    rows = [sample(client) for client, size in CLIENT_SIZES.items() for _ in range(size)]
    file = tmp_path_factory.mktemp("conversations") / "conversations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def federation(tmp_path: Path, tiny_gpt2: Path, conversations: Path) -> FederationMaker:
    """Make a federation; `model`, `data`, `rounds` and `trainer` replace single settings."""

    def make(name: str = "run", *, base: Path = tiny_gpt2, **settings: Any) -> Federation:
        return build_federation(tmp_path / name, base=base, path=conversations, **settings)

    return make


@pytest.fixture
def random_adapters() -> Callable[..., list[Tensor]]:
    """Some flat adapters with normal values."""

    def make(count: int, *, size: int = 50, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(size, generator=generator) for _ in range(count)]

    return make
