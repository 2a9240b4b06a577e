"""The app that a server sends its nodes: a name that each node knows, and no code."""

import io
import zipfile

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.object_ref import load_app

from fedsafe.federated.flower.bundle import (
    CLIENT_APP,
    PYPROJECT,
    SERVER_APP,
    build_bundle,
    check_bundle,
)

OURS = f"""
[tool.flwr.app.components]
serverapp = "fedsafe.federated.flower.server_app:app"
clientapp = "{CLIENT_APP}"
"""


def bundle(**files: str) -> bytes:
    """A bundle of these files; dots of a name are given as two underscores."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "."), text)
    return written.getvalue()


def test_a_node_runs_what_our_server_sends() -> None:
    check_bundle(build_bundle())
    check_bundle(bundle(pyproject__toml=OURS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            bundle(pyproject__toml=OURS, fedsafe__py="import os"),
            r"sent code of its own \(1 files, the first is 'fedsafe.py'\)",
            id="code",
        ),
        pytest.param(
            bundle(pyproject__toml=OURS.replace("client_app:app", "other:app")),
            "asks for .*other:app",
            id="another-app",
        ),
        pytest.param(
            bundle(pyproject__toml=OURS + 'agentapp = "shutil:rmtree"'),
            "asks for .*shutil:rmtree",
            id="another-kind-of-app",
        ),
        pytest.param(bundle(pyproject__toml="a = ["), "no app of Flower's", id="no-toml"),
        pytest.param(bundle(pyproject__toml="a = 1"), "no app of Flower's", id="no-components"),
        pytest.param(
            bundle(pyproject__toml="tool = 1"), "no app of Flower's", id="a-number-for-a-table"
        ),
        pytest.param(
            bundle(pyproject__toml=f"a = {'[' * 9_000}"), "no app of Flower's", id="nested"
        ),
        pytest.param(
            bundle(pyproject__toml=OURS + "#" * 70_000), "takes 70,[0-9]* bytes", id="large"
        ),
        pytest.param(bundle(other__toml=OURS), "no app of Flower's", id="no-pyproject"),
        pytest.param(b"PK", "no app of Flower's", id="no-zip"),
        pytest.param(b"", "no app of Flower's", id="nothing"),
    ],
)
def test_a_node_refuses_anything_else(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_bundle(content)


def test_what_travels_is_a_text_of_names_alone() -> None:
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as archive:
        assert set(archive.namelist()) == {PYPROJECT, ".info/CONTENT"}
        assert len(archive.read(PYPROJECT)) < 1000


def test_flower_finds_the_apps_that_it_names() -> None:
    assert isinstance(load_app(CLIENT_APP, ValueError), ClientApp)
    assert isinstance(load_app(SERVER_APP, ValueError), ServerApp)
