"""The files that a command writes beside each other: whole and all together, or not at all."""

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import Any, TextIO

import psutil


class OutputFiles:
    """Files of one command.

    They are written under other names, which no other process uses, and moved to their places
    together, when all is done: a file that is there is whole.

    Args:
        paths: The files, of JSON lines but for those that end with `.json`.
        unless_empty: Those of them that are not to be there when nothing is written to them.

    Attributes:
        num_lines: Lines written to each since they were opened.
    """

    num_lines: Counter[Path]

    def __init__(self, paths: Sequence[Path], *, unless_empty: Sequence[Path] = ()) -> None:
        self.paths = tuple(paths)
        self.num_lines = Counter()
        self._unless_empty = unless_empty
        self._files: dict[Path, TextIO] = {}

    def check(self, source: Path, *, overwrite: bool) -> None:
        """Refuse to write over the rows that are read, or over files that are there.

        Raises:
            ValueError: If one of the files is either.
        """
        if source.resolve() in {path.resolve() for path in self.paths}:
            raise ValueError(f"{source} is read and would be written too; give another --output")
        found = [str(path) for path in self.paths if path.exists()]
        if found and not overwrite:
            raise ValueError(
                f"{', '.join(found)} would be overwritten; give another --output, or "
                "--overwrite true"
            )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Open the files; move them to their places if no error ends the block."""
        self.num_lines = Counter()
        scratch = {path: _scratch(path, os.getpid()) for path in self.paths}
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
        try:
            with ExitStack() as stack:
                for path, place in scratch.items():
                    file = place.open("w", encoding="utf-8", newline="\n")
                    self._files[path] = stack.enter_context(file)
                yield
            for path, place in scratch.items():
                place.replace(path)
            for path in self._unless_empty:
                if path.stat().st_size == 0:
                    path.unlink()
        finally:
            for place in scratch.values():
                place.unlink(missing_ok=True)

    def written(self) -> list[Path]:
        """Those that are there."""
        return [path for path in self.paths if path.exists()]

    def write(self, path: Path, record: dict[str, Any]) -> None:
        """Write a line to one of them.

        Raises:
            TypeError: If the record holds bytes.
        """
        self._files[path].write(json_line(record))
        self.num_lines[path] += 1

    def write_summary(self, path: Path, summary: dict[str, Any]) -> None:
        """Write all of a JSON file."""
        self._files[path].write(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def check_jsonl(path: Path) -> None:
    """Refuse a name that does not say what the file holds.

    Raises:
        ValueError: If it does not end with .jsonl.
    """
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} would hold JSON lines; give a name that ends with .jsonl")


def write_whole(file: Path, parts: Iterable[str]) -> None:
    """Write one file beside its place and move it there: it is whole, or what it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(file.name + ".tmp")
    with scratch.open("w", encoding="utf-8") as out:
        out.writelines(parts)
    scratch.replace(file)


def json_line(record: dict[str, Any]) -> str:
    r"""A record as a line of JSON; dates and numbers of Parquet's own kinds become text.

    Raises:
        TypeError: If it holds bytes.
    """
    line = json.dumps(record, ensure_ascii=False, default=_as_text)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        line = json.dumps(record, default=_as_text)
    return line + "\n"


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        raise TypeError("holds bytes, which a JSONL file cannot hold; drop that column")
    return str(value)


def _scratch(path: Path, process: int | str) -> Path:
    return path.with_name(f".{path.name}.{platform.node()}-{process}.part")


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine left of a file."""
    for place in path.parent.glob(_scratch(Path(escape(path.name)), "*").name):
        process = place.name.removesuffix(".part").rpartition("-")[2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            place.unlink(missing_ok=True)
