"""Red-team prompts of a file through a reviser: nothing lost, and nothing done twice.

Finished batches are kept beside the output until all are done, so that a command that was killed
goes on behind them.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from fedsafe.data.output_files import OutputFiles, check_jsonl, json_line
from fedsafe.data.prompts import each_prompt
from fedsafe.data.sources import Rejected, bad_rows_error, no_rows_error
from fedsafe.safety.transcripts import Transcript, pair_record
from fedsafe.types import RedTeamPrompt

OnBadRow = Literal["error", "skip"]


def read_prompts(name: str, *, split: str, on_bad_row: OnBadRow) -> list[RedTeamPrompt | Rejected]:
    """What each row of a file gives, in order.

    Raises:
        ValueError: If the file cannot be read, rows are bad and are not to be skipped, or no row
            can be used.
    """
    rows = list(each_prompt(name, split=split))
    bad = [row for row in rows if isinstance(row, Rejected)]
    if bad and on_bad_row == "error":
        raise bad_rows_error(bad, total=len(rows))
    if len(bad) == len(rows):
        raise no_rows_error(bad, names=[name])
    return rows


class Journal:
    """Finished batches on disk, a line each; a line that was not finished does not count.

    Args:
        file: Where they are.
        settings: All that decides a transcript.
        prompts: What the transcripts are of.
        overwrite: Whether batches of other settings or prompts may be thrown away.
    """

    def __init__(
        self,
        file: Path,
        settings: dict[str, Any],
        prompts: Sequence[RedTeamPrompt],
        *,
        overwrite: bool = False,
    ) -> None:
        self._file = file
        asked = [[prompt.messages, prompt.response] for prompt in prompts]
        text = json.dumps([settings, asked], sort_keys=True)
        self._head = {"digest": hashlib.sha256(text.encode()).hexdigest()}
        self._prompts = prompts
        self._overwrite = overwrite
        self._opened: BinaryIO | None = None
        self.transcripts: dict[int, Transcript] = {}
        """By the places of their prompts."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Read what is there, and keep others out; the file goes if no error ends the block.

        Raises:
            ValueError: If another process is writing it, or it holds batches of other settings or
                prompts that may not be thrown away.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._file) as opened:
            self._opened = opened
            self._read(opened)
            yield
            self._file.unlink()

    def add(self, batch: Sequence[tuple[int, Transcript]]) -> None:
        """Keep a finished batch; it is on disk when this returns."""
        self.transcripts |= dict(batch)
        self._write({str(place): _without_prompt(each) for place, each in batch})

    @property
    def is_complete(self) -> bool:
        """Whether every batch is finished."""
        return len(self.transcripts) == len(self._prompts)

    def in_order(self) -> list[Transcript]:
        """The transcripts of all prompts, once every batch is finished."""
        return [self.transcripts[place] for place in range(len(self._prompts))]

    def _read(self, opened: BinaryIO) -> None:
        """Take over the finished batches of the same settings."""
        opened.seek(0)
        lines = opened.readlines()
        whole = [line for line in lines if line.endswith(b"\n")]
        if not whole or json.loads(whole[0]) != self._head:
            if len(whole) > 1 and not self._overwrite:
                raise ValueError(
                    f"{self._file} holds unfinished work of other settings or prompts; give the "
                    "old settings, another --output, or --overwrite true"
                )
            opened.truncate(0)
            self._write(self._head)
            return
        opened.truncate(sum(map(len, whole)))
        for line in whole[1:]:
            for place, values in json.loads(line).items():
                self.transcripts[int(place)] = _with_prompt(values, self._prompts[int(place)])

    def _write(self, record: dict[str, Any]) -> None:
        assert self._opened is not None
        self._opened.write(json_line(record).encode())
        self._opened.flush()
        os.fsync(self._opened.fileno())


class RevisionOutputs:
    """The files of one revision, beside each other; see `OutputFiles`.

    Args:
        kept: JSONL file for the pairs that are kept; its name gives those of the others.
    """

    def __init__(self, kept: Path) -> None:
        check_jsonl(kept)
        self.kept = kept
        self.rejected = kept.with_suffix(".rejected.jsonl")
        self.bad = kept.with_suffix(".bad.jsonl")
        self.summary = kept.with_suffix(".summary.json")
        self.journal = kept.with_name(f".{kept.name}.unfinished")
        paths = (self.rejected, self.bad, self.summary, kept)
        self.files = OutputFiles(paths, unless_empty=(self.bad,))

    def check(self, source: Path, *, overwrite: bool) -> None:
        """Refuse to write over files, but what a command left that was killed at its very end.

        Raises:
            ValueError: If a file would be overwritten.
        """
        self.files.check(source, overwrite=overwrite or self.journal.exists())

    def write(self, row: Transcript | Rejected) -> None:
        """Write what became of a row to the file that it belongs to."""
        if isinstance(row, Rejected):
            self.files.write(self.bad, row._asdict())
        else:
            self.files.write(self.kept if row.dropped is None else self.rejected, pair_record(row))

    def num_rows(self) -> dict[str, int]:
        """Rows written: kept, rejected and bad."""
        lines = self.files.num_lines
        return {
            "kept": lines[self.kept],
            "rejected": lines[self.rejected],
            "bad": lines[self.bad],
        }


def _locked(file: Path) -> BinaryIO:
    """Open a file for this process alone.

    Raises:
        ValueError: If another process has it.
    """
    while True:
        opened = file.open("a+b")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            opened.close()
            raise ValueError(
                f"another command is writing {file}; wait for it, or give another --output"
            ) from error
        if os.fstat(opened.fileno()).st_nlink:
            return opened
        opened.close()  # whoever had it was done, and removed it after it was opened here


def _without_prompt(transcript: Transcript) -> dict[str, Any]:
    values = transcript._asdict()
    del values["prompt"]
    return values


def _with_prompt(values: dict[str, Any], prompt: RedTeamPrompt) -> Transcript:
    lists: dict[str, Any] = {n: tuple(v) for n, v in values.items() if isinstance(v, list)}
    return Transcript(prompt=prompt, **(values | lists))
