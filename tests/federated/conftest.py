"""A tiny federation that trains in a fraction of a second, and one call that runs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import Federation, build_federation, write_conversations
from torch import Tensor

FederationMaker = Callable[..., Federation]


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of short conversations of four clients of different sizes."""
    file = tmp_path_factory.mktemp("conversations") / "conversations.jsonl"
    write_conversations(file)
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
