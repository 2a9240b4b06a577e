"""A federation over letters is the federation in one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from federations import Federation
from remote_federations import build_post, build_server

from fedsafe.federated.remote import reception, visits

FederationMaker = Callable[..., Federation]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reception, visits):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(reception, "NODES_SECONDS", 0.0)


def test_the_adapter_and_the_record_are_those_of_one_process(
    federation: FederationMaker, tiny_gpt2: Path, conversations: Path, tmp_path: Path
) -> None:
    here = federation("here").fit()
    post = build_post(base=tiny_gpt2, path=conversations)
    fleet = {"min_clients": 2, "grace_seconds": 5.0}
    there = build_server(tmp_path / "there", post, base=tiny_gpt2, fleet=fleet).fit()
    assert torch.equal(there.adapter, here.adapter)
    assert there.rows == here.rows
