"""What an installed package must hold, told by setup.cfg alone: nothing is built."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "fedsafe"
DISTRIBUTIONS = {"yaml": "pyyaml"}
"""Packages whose distribution has another name."""
DATA_FILES = [
    path
    for path in PACKAGE.rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
]


def packaged(patterns: list[str]) -> set[Path]:
    """Files that setuptools would take: each package's patterns, from its folder."""
    packages = [path.parent for path in PACKAGE.rglob("__init__.py")]
    return {file for folder in packages for each in patterns for file in folder.glob(each)}


def imported(*, at_once: bool = False) -> set[str]:
    """Names of the distributions that some module imports.

    `at_once` leaves out functions, and the modules that only Flower itself loads.
    """
    names = set()
    for file in PACKAGE.rglob("*.py"):
        if at_once and file.parent == PACKAGE / "federated" / "flower":
            continue
        tree = ast.parse(file.read_text())
        for node in tree.body if at_once else ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).split(".")[0])
    names -= {"fedsafe", *sys.stdlib_module_names}
    return {DISTRIBUTIONS.get(name, name) for name in names}


@pytest.fixture
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


@pytest.fixture
def patterns(setup_cfg: configparser.ConfigParser) -> list[str]:
    return setup_cfg["options.package_data"]["*"].split()


def distributions(requirements: str) -> set[str]:
    return set(re.findall(r"^[\w-]+", requirements, re.MULTILINE))


def test_what_is_imported_is_required_and_pinned(setup_cfg: configparser.ConfigParser) -> None:
    required = distributions(setup_cfg["options"]["install_requires"])
    extras = setup_cfg["options.extras_require"]
    optional = distributions(extras["vllm"] + extras["judge"] + extras["flower"])
    assert imported(at_once=True) <= required
    assert imported() <= required | optional
    pinned = re.findall(r"^([\w-]+)==", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)
    assert required <= {name.lower() for name in pinned}


@pytest.mark.parametrize("file", DATA_FILES, ids=lambda file: file.name)
def test_every_data_file_is_packaged(file: Path, patterns: list[str]) -> None:
    assert file in packaged(patterns)


def test_a_file_that_no_pattern_names_is_not_packaged(patterns: list[str]) -> None:
    refusals = PACKAGE / "safety" / "refusals.txt"
    assert refusals in DATA_FILES
    assert refusals not in packaged([each for each in patterns if not each.endswith(".txt")])
