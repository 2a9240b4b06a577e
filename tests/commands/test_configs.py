"""Every file of configs/ is parsed as its opening comment says, and every algorithm trains."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import yaml
from jsonargparse import auto_parser

from fedsafe.cli import main
from fedsafe.commands.table import table

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
ALGORITHMS = sorted((REPOSITORY / "configs" / "algorithm").glob("*.yaml"))


def arguments_of(file: Path) -> list[str]:
    """The `fedsafe` command in a file's first lines, without the program."""
    [command] = re.findall(r"fedsafe (?:fit|table) [^\n]*", file.read_text())[:1]
    return shlex.split(command)[1:]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands name files relative to it."""
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_command_of_a_configuration_is_parsed(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = arguments_of(file)
    assert str(file.relative_to(REPOSITORY)) in arguments
    if name == "table":
        rows = auto_parser(table, as_positional=False).parse_args(arguments).rows
        assert all(Path(config).is_file() for row in rows for config in row.configs)
        return
    with pytest.raises(SystemExit) as caught:
        main([name, *arguments, "--print_config"])
    assert caught.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    for part, values in yaml.safe_load(file.read_text()).items():
        if isinstance(values, dict):
            assert values.keys() <= parsed[part].keys()


def test_no_algorithm_is_forgotten() -> None:
    names = "central fedadagrad fedadam fedavg fedavgm fedprox fedyogi local scaffold"
    assert [file.stem for file in ALGORITHMS] == names.split()


@pytest.mark.parametrize("file", ALGORITHMS, ids=lambda file: file.stem)
def test_every_algorithm_trains(file: Path, config: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(config), "--config", str(file), "--run_dir", str(tmp_path / "run")]
    assert main(["fit", *arguments]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").open()]
    assert [row["round"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["val/loss"]) for row in rows)
    assert rows[1]["val/loss"] < rows[0]["val/loss"] + 1
    if file.stem == "local":
        assert len(list((tmp_path / "run" / "adapters").iterdir())) >= 2
    else:
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "rounds.png").is_file()
