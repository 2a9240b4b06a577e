"""What the guide says is there: commands and their options, settings, errors, files."""

import ast
import dataclasses
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src" / "fedsafe"
GUIDE = REPOSITORY / "docs" / "federation.md"
TEXTS = (GUIDE, REPOSITORY / "README.md")
SIDES = ("server", "client")
OF_FIT = {
    "server": {"--config", "--run_dir", "--fleet.min_clients"},
    "client": {"--config", "--data.path", "--data.filter"},
}
"""Options of `fedsafe fit` that the guide gives to one of the sides."""


def commands(file: Path, beginning: str) -> list[list[str]]:
    """Lines of a text's code blocks that begin so, in words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(beginning)]


def rows(heading: str) -> list[tuple[str, str]]:
    """Rows of the guide's first table behind some words: two cells each."""
    table = GUIDE.read_text().partition(heading)[2].partition("|---|---|\n")[2].partition("\n\n")[0]
    found = [line.strip("|").split(" | ") for line in table.splitlines()]
    return [(row[0].strip(), row[1].strip()) for row in found]


@pytest.mark.parametrize("side", SIDES)
def test_commands_have_the_options_that_they_are_given(side: str) -> None:
    pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")
    parser = import_module(f"fedsafe.commands.federate_{side}").parser()
    found = [each for file in TEXTS for each in commands(file, f"fedsafe federate {side}")]
    assert len(found) >= 3
    for _, _, _, *options in found:
        _, left = parser.parse_known_args(options)
        assert {word for word in left if word.startswith("-")} <= OF_FIT[side], options
        configs = [Path(word) for word in left if word.startswith("configs/")]
        assert all((REPOSITORY / config).is_file() for config in configs)


def test_scripts_in_the_guide_are_there() -> None:
    found = [command[1] for command in commands(GUIDE, "sh ")]
    assert found == ["deploy/flower/make-certificates.sh", "deploy/flower/make-node-key.sh"]
    assert all((REPOSITORY / script).is_file() for script in found)


def test_the_guide_has_every_setting_of_the_fleet_with_its_default() -> None:
    from fedsafe.federated.remote.fleet import Fleet

    told = {}
    for cell, _ in rows("| `--fleet.` |"):
        name, default = re.fullmatch(r"`(\w+)` \((\w+)\)", cell).groups()  # type: ignore[union-attr]
        told[name] = default
    words = {"target_clients": "all", "clients": "anyone"}
    assert told == {
        field.name: words[field.name]
        if field.default is None
        else f"{field.default:g}"
        if isinstance(field.default, float)
        else str(field.default)
        for field in dataclasses.fields(Fleet)
    }


def texts_of(folder: Path) -> str:
    """Every text in the code, a line each; what is filled in is an ellipsis."""
    found = []
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_error_in_the_guide_is_one_that_the_code_says() -> None:
    said = texts_of(SOURCE)
    told = [
        error
        for cell, _ in rows("## What to do about an error")
        for error in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(told) > 20
    for error in told:
        if error == "model.base":
            continue
        pattern = ".{0,60}".join(re.escape(part.strip()) for part in error.split("…"))
        assert re.search(pattern, said), f"no error of the code says {error!r}"


@pytest.mark.parametrize("status", ["late", "refused", "failed"])
def test_the_guide_explains_every_status_of_a_client(status: str) -> None:
    from typing import get_args

    from fedsafe.federated.server import NotAccepted

    explained = [cell.strip("`") for cell, _ in rows("has a `status` and a `reason`")]
    assert status in explained
    assert set(explained) == set(get_args(NotAccepted))


def test_links_of_the_guide_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", GUIDE.read_text()):
        if not link.startswith("http"):
            assert (GUIDE.parent / link).exists(), link
