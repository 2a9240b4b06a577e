"""`fedsafe fit` behind a guard, configured as a user would."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsafe.cli import main

PLANTED = {"unsafe": "zebrafish", "safe": "quicksilver", "held": "marmalade"}
"""Words in the prompts of the samples that become unsafe, stay, and are held out or stay."""

FilteredFit = Callable[..., int]


@pytest.fixture
def filtered_fit(config: Path, tmp_path: Path, own_cache: Path) -> FilteredFit:
    """Run `fedsafe fit` on planted conversations with a guard that finds `red`."""
    settings = yaml.safe_load(config.read_text())
    rows = [
        {
            "prompt": f"the {PLANTED['unsafe'] if n % 4 == 0 else PLANTED['safe']} {n}",
            "response": f"{'red' if n % 4 == 0 else 'blue'} {PLANTED['held']}",
            "client": f"c{n % 3}",
            "label": "unsafe" if n % 4 == 0 else "safe",
        }
        for n in range(36)
    ]
    file = tmp_path / "planted.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "zebrafish"}\n')
    settings["data"]["path"] = str(file)
    settings["data"]["on_bad_row"] = "skip"
    settings["data"]["filter"] = {
        "guard": {"class_path": "word_guard.WordGuard", "init_args": {"word": "red"}},
        "policy": "refuse",
    }
    mine = tmp_path / "filtered.yaml"
    mine.write_text(yaml.safe_dump(settings))

    def run(run_dir: Path, *arguments: str) -> int:
        return main(["fit", "--config", str(mine), "--run_dir", str(run_dir), *arguments])

    return run


def files_with(word: str, folder: Path) -> list[str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    return [file.name for file in files if word.encode() in file.read_bytes()]


def test_no_text_of_a_sample_is_in_any_file_of_the_run(
    filtered_fit: FilteredFit, tmp_path: Path
) -> None:
    assert filtered_fit(tmp_path / "run") == 0
    for word in PLANTED.values():
        assert files_with(word, tmp_path / "run") == []
    rows = verdicts(tmp_path / "run")
    assert len(rows) == 36
    assert sum(row["action"] == "refused" for row in rows) == 9
    assert (tmp_path / "run" / "rejected.jsonl").exists()


def verdicts(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "filter.jsonl").read_text().splitlines()]


def test_text_is_written_where_asked_for_and_nowhere_else(
    filtered_fit: FilteredFit, tmp_path: Path
) -> None:
    assert filtered_fit(tmp_path / "run", "--data.filter.record_text", "true") == 0
    for word in PLANTED.values():
        assert files_with(word, tmp_path / "run") == ["filter.jsonl"]


def test_the_run_tells_what_the_filter_did(
    filtered_fit: FilteredFit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert filtered_fit(tmp_path / "run", "--data.filter.policy", "drop") == 0
    out, err = capfd.readouterr()
    assert "Safety filter: word-guard" in out
    assert "policy drop, unsafe from 0.5" in out
    assert "samples unsafe" in out.partition("Summary")[2]
    assert not any(word in out + err for word in PLANTED.values())
    assert {row["action"] for row in verdicts(tmp_path / "run")} == {"kept", "dropped"}
    assert len(list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))) == 2


def test_a_resume_takes_the_settings_of_the_filter_from_the_run(
    filtered_fit: FilteredFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert filtered_fit(run_dir, "--rounds", "1") == 0
    before = (run_dir / "filter.jsonl").read_bytes()
    other = ("--ckpt_path", "last", "--data.filter.threshold", "0.95")
    assert filtered_fit(run_dir, *other) == 1
    assert "data.filter was 'refuse, pair, threshold 0.5, word-guard" in capsys.readouterr()[1]
    assert filtered_fit(run_dir, "--ckpt_path", "last") == 0
    assert (run_dir / "filter.jsonl").read_bytes() == before


def test_a_misspelt_setting_of_the_filter_is_named(
    filtered_fit: FilteredFit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        filtered_fit(tmp_path / "run", "--data.filter.treshold", "0.4")
    assert "treshold" in capsys.readouterr()[1]


def test_the_written_configuration_starts_the_same_run_again(
    filtered_fit: FilteredFit, tmp_path: Path
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert filtered_fit(run) == 0
    assert main(["fit", "--config", str(run / "config.yaml"), "--run_dir", str(again)]) == 0
    assert (again / "filter.jsonl").read_bytes() == (run / "filter.jsonl").read_bytes()


def test_the_filters_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--data.filter.help"])
    text = " ".join(capsys.readouterr()[0].split())
    assert "Probability from which a sample is unsafe" in text
    assert "`drop` leaves it out" in text
