"""A federation over letters, all of it in this process and without pauses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federations import Federation
from memory_post import MemoryPost, Node
from remote_federations import build_nodes, build_server

from fedsafe.federated.remote import reception, visits

ServerMaker = Callable[..., Federation]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reception, visits):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(reception, "NODES_SECONDS", 0.0)


@pytest.fixture(scope="session")
def honest_nodes(tiny_gpt2: Path, conversations: Path) -> dict[int, Node]:
    """A node for each of the four clients, from number 11 on; they remember nothing."""
    return build_nodes(base=tiny_gpt2, path=conversations)


@pytest.fixture
def post(honest_nodes: dict[int, Node]) -> MemoryPost:
    return MemoryPost(honest_nodes)


@pytest.fixture
def nodes(tiny_gpt2: Path, conversations: Path) -> Callable[..., dict[int, Node]]:
    """Make a node for each of the four clients; the settings replace single ones."""

    def make(*, path: Path = conversations, **settings: Any) -> dict[int, Node]:
        return build_nodes(base=tiny_gpt2, path=path, **settings)

    return make


@pytest.fixture
def server(tmp_path: Path, tiny_gpt2: Path) -> ServerMaker:
    """Make a server; the settings replace single ones."""

    def make(post: MemoryPost, name: str = "server", **settings: Any) -> Federation:
        return build_server(tmp_path / name, post, base=tiny_gpt2, **settings)

    return make
