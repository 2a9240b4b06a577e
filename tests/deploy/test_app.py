"""The app for those who start Flower themselves: the same that the server sends."""

import io
import tomllib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")
from flwr.cli.build import build_fab_from_disk

from fedsafe.federated.flower.bundle import PYPROJECT, build_bundle, check_bundle

APP = Path(__file__).resolve().parents[2] / "deploy" / "flower" / "app"


def test_a_node_accepts_what_flower_makes_of_the_folder() -> None:
    check_bundle(build_fab_from_disk(APP))


def test_it_is_the_servers_own_app() -> None:
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as archive:
        servers = tomllib.loads(archive.read(PYPROJECT).decode())
    assert tomllib.loads((APP / PYPROJECT).read_text()) == servers
    assert [file.name for file in APP.iterdir()] == [PYPROJECT]
