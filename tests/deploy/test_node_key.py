"""A node's key: the one that Flower takes, readable by its owner alone."""

import argparse
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

if shutil.which("ssh-keygen") is None:
    pytest.skip("ssh-keygen is not installed", allow_module_level=True)
pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")

SCRIPT = "make-node-key.sh"
ScriptRun = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory, run_script: ScriptRun) -> Path:
    """The private key of a node; its public one lies beside it."""
    file = tmp_path_factory.mktemp("a node") / "ada"
    result = run_script(SCRIPT, file)
    assert result.returncode == 0, result.stderr
    return file


def test_flower_loads_both_halves_and_they_belong_together(key: Path) -> None:
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    node = argparse.Namespace(auth_supernode_private_key=str(key), auth_supernode_public_key=None)
    loaded = _try_setup_client_authentication(node)
    assert loaded is not None
    private, public = loaded
    assert private.curve.name == "secp384r1"
    assert try_load_public_key(key.with_suffix(".pub")) == public_key_to_bytes(public)


def test_the_private_key_is_for_its_owner_alone(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.with_suffix(".pub").stat().st_mode & 0o777 == 0o644
    assert key.with_suffix(".pub").read_text().split()[2] == "ada"


@pytest.mark.parametrize("there", ["ada", "ada.pub"])
def test_nothing_is_overwritten(tmp_path: Path, run_script: ScriptRun, there: str) -> None:
    (tmp_path / there).write_text("kept")
    result = run_script(SCRIPT, tmp_path / "ada")
    assert result.returncode == 1
    assert f"{there} exists; move it away to make a new one" in result.stderr
    assert [file.read_text() for file in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "give one file name for the private key; got 0", id="none"),
        pytest.param(["a", "b"], "got 2 arguments", id="two"),
        pytest.param(["--help"], "'--help' is no file name", id="option"),
    ],
)
def test_bad_arguments_are_named(run_script: ScriptRun, arguments: list[str], message: str) -> None:
    result = run_script(SCRIPT, *arguments)
    assert result.returncode == 1
    assert message in result.stderr
