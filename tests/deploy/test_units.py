"""The systemd units and their examples: what they run, with which options, and what they forbid."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "flower"
UNITS = ("fedsafe-server.service", "fedsafe-client@.service")
EXAMPLES = {"server": "server.env.example", "client": "client.env.example"}


def read_unit(name: str) -> dict[str, dict[str, list[str]]]:
    """Sections of a unit; a key may be given several times."""
    parser = configparser.RawConfigParser(
        strict=False, delimiters="=", interpolation=None, dict_type=dict
    )
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    text = (DEPLOY / name).read_text()
    parser.read_string(text)
    return {
        section: {key: re.findall(rf"^{key}=(.*)$", text, re.MULTILINE) for key in parser[section]}
        for section in parser.sections()
    }


def read_environment(name: str) -> dict[str, str]:
    """An example of a file of the environment, as systemd reads it."""
    lines = (DEPLOY / name).read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    return {key: shlex.split(value)[0] for key, value in pairs}


def command_of(unit: str) -> list[str]:
    """What a unit starts, in words; `$$` is systemd's `$`."""
    (line,) = read_unit(unit)["Service"]["ExecStart"]
    return [word.replace("$$", "$").replace("%i", "ada") for word in shlex.split(line)]


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_one_that_systemd_accepts(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / name
    unit.write_text(
        (DEPLOY / name).read_text().replace("/opt/fedsafe/.venv/bin/fedsafe", "/bin/true")
    )
    result = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_no_root_writes_in_one_place_and_reports_nothing_home(name: str) -> None:
    service = read_unit(name)["Service"]
    assert service["User"] == ["fedsafe"]
    assert service["StateDirectory"] == ["fedsafe"]
    for key, value in {
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "UMask": "0077",
        "Restart": "on-failure",
    }.items():
        assert service[key] == [value], key
    environment = " ".join(service["Environment"]).split()
    assert {"FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"} <= set(environment)


def run_server_unit(tmp_path: Path, run_dir: Path) -> list[str]:
    """Start what the server's unit starts; what its `fedsafe` is asked, instead of being run."""
    stand_in = tmp_path / "bin" / "fedsafe"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    stand_in.chmod(0o755)
    environment = {
        **read_environment("server.env.example"),
        "FEDSAFE_RUN_DIR": str(run_dir),
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
    }
    result = subprocess.run(
        command_of("fedsafe-server.service"),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.splitlines()


def test_the_server_starts_a_new_run_and_goes_on_with_one_that_is_there(tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    fresh = run_server_unit(tmp_path, run_dir)
    assert fresh[:2] == ["federate", "server"]
    assert fresh[-2:] == ["--run_dir", str(run_dir)]
    assert fresh[2:-2] == read_environment("server.env.example")["FEDSAFE_OPTIONS"].split()

    run_dir.mkdir()
    assert run_server_unit(tmp_path, run_dir) == [*fresh, "--ckpt_path", "last"]


def server_options() -> list[str]:
    options = read_environment("server.env.example")["FEDSAFE_OPTIONS"].split()
    return [*options, "--run_dir", "x"]


def client_options() -> list[str]:
    words = command_of("fedsafe-client@.service")
    assert words[:3] == ["/opt/fedsafe/.venv/bin/fedsafe", "federate", "client"]
    assert words[-1] == "$FEDSAFE_OPTIONS"
    return words[3:-1] + read_environment("client.env.example")["FEDSAFE_OPTIONS"].split()


@pytest.mark.parametrize(
    ("side", "options", "training"),
    [
        pytest.param("server", server_options, {"--config", "--run_dir"}, id="server"),
        pytest.param("client", client_options, {"--config", "--data.path"}, id="client"),
    ],
)
def test_every_option_is_one_that_the_command_has(
    side: str, options: Callable[[], list[str]], training: set[str]
) -> None:
    """The command takes its own; what it leaves is for the training."""
    pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")
    from importlib import import_module

    parser = import_module(f"fedsafe.commands.federate_{side}").parser()
    left = parser.parse_known_args(options())[1]
    assert {word for word in left if word.startswith("--")} == training
    own = {word for word in options() if word.startswith("--")} - training
    assert own <= set(parser._option_string_actions)
    assert own, "the example shows none of the command's own options"


@pytest.mark.parametrize("side", EXAMPLES)
def test_an_example_names_files_and_holds_no_secret(side: str) -> None:
    values = read_environment(EXAMPLES[side])
    assert set(values) <= {"FEDSAFE_OPTIONS", "FEDSAFE_RUN_DIR"}
    text = (DEPLOY / EXAMPLES[side]).read_text()
    assert "PRIVATE" not in text
    assert not re.search(r"(secret|password|token)\w*=", text, re.IGNORECASE)


def test_the_readme_names_every_file_and_no_other() -> None:
    readme = (DEPLOY / "README.md").read_text()
    rows = [line.split("|")[1] for line in readme.splitlines() if line.startswith("| `")]
    named = {word.split()[0].rstrip("/") for row in rows for word in re.findall(r"`([^`]+)`", row)}
    there = {path.name for path in DEPLOY.iterdir()} - {"README.md"}
    assert named >= there
    assert named - there <= {"app"}
