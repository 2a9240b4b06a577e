"""What is changed in Flower's SuperNode is still there to be changed, and does what it should."""

import time
from importlib import import_module

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")

from flwr.cli.build import build_fab_from_files

from fedsafe.federated.flower import supernode
from fedsafe.federated.flower.bundle import build_bundle

NODE = import_module("flwr.supernode.start_client_internal")
CONSTANTS = {
    "flwr.supercore.retry.http_retry": "MAX_RETRY_DELAY",
    "flwr.supernode.fleet_http_connection": "HEARTBEAT_DEFAULT_INTERVAL",
    "flwr.supercore.heartbeat": "HEARTBEAT_DEFAULT_INTERVAL",
}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a test changes."""
    monkeypatch.setattr(NODE, "time", time)
    monkeypatch.setattr(NODE, "get_fused_config_from_fab", NODE.get_fused_config_from_fab)
    for name, constant in CONSTANTS.items():
        module = import_module(name)
        monkeypatch.setattr(module, constant, getattr(module, constant))


def test_a_node_asks_more_often_and_is_sooner_missed() -> None:
    before = [getattr(import_module(name), constant) for name, constant in CONSTANTS.items()]
    supernode._make_quick()
    after = [getattr(import_module(name), constant) for name, constant in CONSTANTS.items()]
    assert all(new < old for new, old in zip(after, before, strict=True))
    assert after[1] >= import_module("flwr.common.constant").HEARTBEAT_MIN_INTERVAL
    begun = time.monotonic()
    NODE.time.sleep(3)
    assert 0.9 < time.monotonic() - begun < 2.5


def test_code_ends_the_node_before_flower_reads_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[bytes] = []
    monkeypatch.setattr(
        NODE, "get_fused_config_from_fab", lambda content, run: read.append(content)
    )
    supernode._refuse_code()
    bundle = build_bundle()
    NODE.get_fused_config_from_fab(bundle, None)
    assert read == [bundle]
    text = import_module("fedsafe.federated.flower.bundle")._TEXT
    with_code = text.replace('["pyproject.toml"]', '["**/*.py"]')
    files = {"pyproject.toml": with_code.encode(), "fedsafe/evil.py": b"print()"}
    with pytest.raises(SystemExit) as caught:
        NODE.get_fused_config_from_fab(build_fab_from_files(files)[0], None)
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith(f"{supernode.REFUSED}the server sent code of its own")
    assert read == [bundle]
