"""The folder of a table's run: its settings, its log, and what it found, kept for the next time."""

import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from fedsafe.data.output_files import write_whole
from fedsafe.federated.round_log import RoundLog
from fedsafe.table_settings import Layer

Command = Callable[[str, list[str]], None]
"""Runs a command of the Trainer, `fit` or `test`, with these arguments."""

_RESULT = "result.json"
_TRAINED = "trained.json"
_STAMP = "settings"


class Todo(Enum):
    """What a run's folder leaves to do; the value says so after a number of runs."""

    NOTHING = "kept"
    MEASURE = "to be measured"
    GO_ON = "to go on"
    TRAIN_ANEW = "to be run anew, as their settings or files are others than before"
    RUN = "to be run"


def digest(*parts: object) -> str:
    """Changes whenever the parts do."""
    text = json.dumps(parts, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def kept_result(folder: Path, *, everything: str) -> dict[str, Any] | None:
    """The result in a folder, if there is one of the same settings; see `kept`."""
    file = folder / _RESULT
    if not file.exists():
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    return result if result.pop("digest") == everything else None


def todo(folder: Path, *, training: str, everything: str) -> Todo:
    """What `kept` would do in a folder."""
    if kept_result(folder, everything=everything) is not None:
        return Todo.NOTHING
    stamp = folder / _STAMP
    if not stamp.exists():
        return Todo.RUN
    if stamp.read_text() != training:
        return Todo.TRAIN_ANEW
    measured = (folder / _TRAINED).exists() or (folder / _RESULT).exists()
    return Todo.MEASURE if measured else Todo.GO_ON


def kept(
    folder: Path, *, training: str, everything: str, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result in a folder, made if there is none of the same settings.

    Args:
        folder: Of the run.
        training: Digest of the settings of training; others clear the folder.
        everything: Digest of all settings; others measure anew.
        make: Runs what is missing.
    """
    found = kept_result(folder, everything=everything)
    if found is not None:
        return found
    _clear_other_settings(folder, training)
    with _output_to(folder / "log.txt"):
        result = make()
    write_whole(folder / _RESULT, [json.dumps({**result, "digest": everything})])
    return result


def _clear_other_settings(folder: Path, training: str) -> None:
    """Remove what a run left under other settings: a half-done one of theirs must not go on."""
    stamp = folder / _STAMP
    if not stamp.exists() or stamp.read_text() != training:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(training)


def train(command: Command, folder: Path, layers: Sequence[Layer]) -> float:
    """Train in `folder/fit`, if that has not been done; what is half done goes on.

    Returns:
        Seconds that it took, with those of the rounds before it was interrupted.
    """
    done, run_dir = folder / _TRAINED, folder / "fit"
    if done.exists():
        return float(json.loads(done.read_text())["seconds"])
    before: float = sum(row["seconds"] for row in RoundLog(run_dir / "rounds.jsonl").read())
    started = time.perf_counter()
    arguments = written(folder / "configs", [*layers, Layer("run", {"run_dir": str(run_dir)})])
    if run_dir.exists():
        arguments += ["--ckpt_path", "last"]
    command("fit", arguments)
    seconds = before + time.perf_counter() - started
    write_whole(done, [json.dumps({"seconds": seconds})])
    return seconds


def written(folder: Path, layers: Sequence[Layer]) -> list[str]:
    """Write layers as files in their order; returns the arguments that name them."""
    shutil.rmtree(folder, ignore_errors=True)
    arguments = []
    for number, layer in enumerate(layers):
        file = folder / f"{number}-{Path(layer.file).stem}.yaml"
        text = yaml.safe_dump(_plain(layer.settings), sort_keys=False, allow_unicode=True)
        write_whole(file, [f"# {layer.file}\n", text])
        arguments += ["--config", str(file)]
    return arguments


def _plain(settings: Any) -> Any:
    """Settings of YAML's own types: a tuple would be written as one of Python's."""
    if isinstance(settings, Mapping):
        return {name: _plain(each) for name, each in settings.items()}
    if isinstance(settings, list | tuple):
        return [_plain(each) for each in settings]
    return settings


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Send what this process prints, libraries included, to a file."""
    saved = os.dup(1), os.dup(2)
    with file.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        except Exception:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
