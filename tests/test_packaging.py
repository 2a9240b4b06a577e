"""What an installed package must hold, told by setup.cfg alone: nothing is built."""

import configparser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "fedsafe"
DATA_FILES = [
    path
    for path in PACKAGE.rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
]


def packaged(patterns: list[str]) -> set[Path]:
    """Files that setuptools would take: each package's patterns, from its folder."""
    packages = [path.parent for path in PACKAGE.rglob("__init__.py")]
    return {file for folder in packages for each in patterns for file in folder.glob(each)}


@pytest.fixture
def patterns() -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser["options.package_data"]["*"].split()


@pytest.mark.parametrize("file", DATA_FILES, ids=lambda file: file.name)
def test_every_data_file_is_packaged(file: Path, patterns: list[str]) -> None:
    assert file in packaged(patterns)


def test_a_file_that_no_pattern_names_is_not_packaged(patterns: list[str]) -> None:
    openings = PACKAGE / "evaluation" / "refusal_openings.txt"
    assert openings in DATA_FILES
    assert openings not in packaged([each for each in patterns if not each.endswith(".txt")])
