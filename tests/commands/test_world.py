import json
from pathlib import Path

import pytest

from fedsafe.cli import main
from fedsafe.commands import world

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def quick_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the place of the pretrained base, which takes a minute to make."""
    base = tmp_path / "cache" / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    monkeypatch.setattr("fedsafe.world.files.pretrained_base", lambda *args, **kwargs: base)


def test_the_world_is_written_as_asked(tmp_path: Path, capsys: Captured) -> None:
    output = tmp_path / "world"
    asked = ["--num_clients", "3", "--samples_per_client", "10", "--harm_share", "0"]
    assert main(["world", "--output", str(output), *asked]) == 0
    rows = [json.loads(line) for line in (output / "clients.jsonl").open()]
    assert len(rows) == 30
    assert len({row["client"] for row in rows}) == 3
    assert {row["label"] for row in rows} == {"safe"}
    assert (output / "base" / "config.json").exists()
    assert f"wrote {output}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--harm_share", "2"], "harm_share"),
        (["--num_clients", "0"], "num_clients"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_wrong_arguments_exit_with_2(
    arguments: list[str], name: str, tmp_path: Path, capsys: Captured
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["world", "--output", str(tmp_path / "world"), *arguments])
    assert caught.value.code == 2
    assert name in capsys.readouterr().err


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world, "write_world", full)
    assert main(["world", "--output", str(tmp_path / "world")]) == 1
    assert "fedsafe world: [Errno 28] No space left on device" in capsys.readouterr().err
