"""Rows of a file, one at a time, and where it cannot be read on: by file type.

Whether a row is a sample is not decided here; see `sources`.
"""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq


class Row(NamedTuple):
    """One row as the reader of its file type found it."""

    number: int
    record: object
    problem: str | None = None
    place: str = ""


def _read_jsonl(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    number = 0
    # Bytes that are not UTF-8 become surrogates, which the check of the row they are in reports.
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_row(number, line)
        except (EOFError, OSError, zlib.error) as error:
            yield Row(number + 1, None, f"broken file, nothing is read from here on: {error}")


def _json_row(number: int, line: str) -> Row:
    try:
        return Row(number, json.loads(line))
    except (ValueError, RecursionError) as error:
        return Row(number, None, f"broken JSON: {error}")


def _read_json(path: Path) -> Iterator[Row]:
    """Rows of a list, one at a time: the text is in memory, its rows as objects are not."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape").rstrip()
    if re.fullmatch(r"\s*(\[\s*\])?", text):
        return
    decode = json.JSONDecoder().raw_decode
    skip = cast(Callable[..., re.Match[str]], re.compile(r"\s*").match)
    number, line, counted, position = 0, 1, 0, skip(text).end()
    if text[position] != "[":
        yield Row(0, None, "the file is not a list of samples: it does not start with [")
        return
    while number == 0 or text[position : position + 1] == ",":
        position = skip(text, position + 1).end()
        line, counted = line + text.count("\n", counted, position), position
        place = f"(line {line}) "
        try:
            record, position = decode(text, position)
        except (ValueError, RecursionError) as error:
            yield Row(number, None, f"broken JSON, nothing is read from here on: {error}", place)
            return
        yield Row(number, record, place=place)
        number += 1
        position = skip(text, position).end()
    if text[position:] != "]":
        problem = "broken JSON, nothing is read from here on: a comma or the only ] must follow"
        yield Row(number, None, problem, place)


def _read_csv(path: Path) -> Iterator[Row]:
    # The default limit is 128 KiB a field, less than a long conversation.
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Strict: a quote that is never closed is an error, not one field with the rest of the file.
        lines = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            number = lines.line_num + 1
            try:
                values = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(number, None, f"broken CSV: {error}")
                continue
            if header is None:
                header = values
            elif len(values) == len(header):
                yield Row(number, dict(zip(header, values, strict=True)))
            elif values:
                problem = f"has {len(values)} fields where the header has {len(header)}"
                yield Row(number, None, problem)


def _read_parquet(path: Path) -> Iterator[Row]:
    if path.stat().st_size == 0:
        return
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    yield Row(number, record)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        yield Row(number, None, f"broken Parquet, nothing is read from here on: {error}")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""How to read a file, by the end of its name in lower case."""
