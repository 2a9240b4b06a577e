"""Verdicts kept on disk, so that a guard judges each conversation once.

One SQLite file for each identity of a guard: a hash of the conversation, the probability as it came
(float64), the categories. Never text.
"""

import json
import re
import sqlite3
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import track

from fedsafe.cache import cache_dir
from fedsafe.data.kept_database import kept_database
from fedsafe.peers import ALONE, Peers
from fedsafe.safety.guard import Guard, UnjudgeableError, judge_each
from fedsafe.types import Conversation, Verdict

CHUNK_SIZE = 512
"""Conversations that a guard is given at once; then their verdicts are safe on disk."""

_SCHEMA = """CREATE TABLE IF NOT EXISTS verdicts (
    key BLOB PRIMARY KEY, unsafe REAL NOT NULL, categories TEXT NOT NULL, shortened INTEGER NOT NULL
) WITHOUT ROWID"""


def conversation_key(conversation: Conversation) -> bytes:
    """Hash of a conversation's roles and contents, 16 bytes."""
    turns = [[turn["role"], turn["content"]] for turn in conversation]
    return blake2b(json.dumps(turns).encode(), digest_size=16).digest()


class ScoreCache:
    """A guard's verdicts, from disk where it gave them before.

    Several processes may use one cache at once. A killed process loses the chunk under way, and the
    next one judges the same chunks as if nothing had happened: the last bits of a probability may
    depend on what was judged together.

    Args:
        guard: Who judges what is not there yet; where all is, its weights are not loaded.
        folder: Where verdicts are kept, in a folder for each guard's name; None is `verdicts` in
            `fedsafe.cache.cache_dir()`.
    """

    def __init__(self, guard: Guard, folder: Path | None = None) -> None:
        self._guard = guard
        self._folder = folder

    def verdicts(
        self, conversations: Sequence[Conversation], *, peers: Peers = ALONE
    ) -> list[Verdict]:
        """One verdict a conversation, in order.

        What is missing is judged in the order given, each distinct conversation once, in chunks of
        `CHUNK_SIZE` that are kept as soon as they are judged.

        Args:
            conversations: What to judge; the same on all ranks.
            peers: Ranks that share the chunks. What is missing is missing on the first one's disk,
                which gets all verdicts; theirs may be others.

        Raises:
            UnjudgeableError: If a conversation cannot be judged; the chunks before it are kept.
            ValueError: If the guard's probability is none; it is not kept.
            OSError: If verdicts cannot be read or written.
        """
        keys = [conversation_key(each) for each in conversations]
        known = peers.from_first(lambda: self._known(dict.fromkeys(keys)))
        places: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            if key not in known:
                places.setdefault(key, place)

        def judge(chunk: Sequence[bytes]) -> dict[bytes, Verdict]:
            try:
                judged = self._guard.judge([conversations[places[key]] for key in chunk])
            except UnjudgeableError as error:
                raise error.renumbered([places[key] for key in chunk]) from error
            return self._kept(dict(zip(chunk, judged, strict=True)))

        title = f"Judging with {self._guard.name}"
        chunks = _in_chunks(list(places), title=title, shown=peers.index == 0)
        for judged in peers.in_turns(chunks, judge):
            self._keep_too(judged, peers)
            known |= judged
        return [known[key] for key in keys]

    def judge_windows(
        self, windows: Sequence[Sequence[Conversation]], *, peers: Peers = ALONE
    ) -> list[tuple[dict[int, Verdict], dict[int, str]]]:
        """Of each window the verdicts by index, and by index why the guard cannot judge the others.

        The result is that of one window after the other, whoever judges them.

        Args:
            windows: Conversations that are judged together; the same on all ranks.
            peers: Ranks that share the windows.

        Raises:
            ValueError: If the guard's probability is none.
            OSError: If verdicts cannot be read or written.
        """
        if peers.size == 1:
            return [_sorted(*judge_each(self.verdicts, window)) for window in windows]
        keys = [[conversation_key(each) for each in window] for window in windows]
        known: dict[bytes, Verdict | str] = {}
        known |= peers.from_first(lambda: self._known(dict.fromkeys(chain.from_iterable(keys))))
        parts = _only_new(windows, keys, known.keys())
        for verdicts, reasons in peers.in_turns(parts, self._judge_part):
            self._keep_too(verdicts, peers)
            known |= verdicts
            known |= reasons
        return [_by_index([known[key] for key in window]) for window in keys]

    def _judge_part(
        self, part: Mapping[bytes, Conversation]
    ) -> tuple[dict[bytes, Verdict], dict[bytes, str]]:
        keys = list(part)
        verdicts, reasons = judge_each(self.verdicts, list(part.values()))
        return (
            {keys[index]: each for index, each in verdicts.items()},
            {keys[index]: each for index, each in reasons.items()},
        )

    # ---- the disk --------------------------------------------------------------------------------

    def _known(self, keys: Iterable[bytes]) -> dict[bytes, Verdict]:
        with self._database() as database:
            return self._find(database, keys)

    def _kept(self, judged: Mapping[bytes, Verdict]) -> dict[bytes, Verdict]:
        """Keep verdicts; returns those on disk, where another process may have been first."""
        self._check(judged.values())
        with self._database() as database:
            self._keep(database, judged)
            return self._find(database, judged)

    def _keep_too(self, judged: Mapping[bytes, Verdict], peers: Peers) -> None:
        """Keep what another rank judged: its disk may be another one."""
        if peers.size > 1 and peers.index == 0:
            with self._database() as database:
                self._keep(database, judged)

    def _database(self) -> AbstractContextManager[sqlite3.Connection]:
        return kept_database(self._file(), schema=_SCHEMA, holds="verdicts")

    def _file(self) -> Path:
        """The file of this guard's identity; warns if its checkpoint is not the one of before."""
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", self._guard.name)
        folder = (self._folder or cache_dir() / "verdicts") / name
        file = folder / f"{blake2b(self._guard.identity.encode(), digest_size=16).hexdigest()}.db"
        origin = blake2b(self._guard.origin.encode(), digest_size=8).hexdigest()
        latest = folder / f"{origin}.latest"
        before = latest.read_text() if latest.exists() else ""  # empty while another writes it
        if before not in ("", file.name) and not file.exists():
            warnings.warn(
                f"the guard {self._guard.name} is not the one whose verdicts are in {folder}: its "
                "checkpoint changed; everything is judged anew",
                stacklevel=4,
            )
        if before != file.name:
            folder.mkdir(parents=True, exist_ok=True)
            latest.write_text(file.name)
        return file

    def _find(self, database: sqlite3.Connection, keys: Iterable[bytes]) -> dict[bytes, Verdict]:
        query = "SELECT unsafe, categories, shortened FROM verdicts WHERE key = ?"
        rows = ((key, database.execute(query, (key,)).fetchone()) for key in keys)
        return {
            key: Verdict(row[0], tuple(json.loads(row[1])), self._guard.name, bool(row[2]))
            for key, row in rows
            if row is not None
        }

    def _check(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            if not 0 <= verdict.unsafe <= 1:
                raise ValueError(
                    f"the guard {self._guard.name} gave {verdict.unsafe} as a probability of "
                    "unsafe; try its weights in float32, and check that they belong to its format"
                )

    def _keep(self, database: sqlite3.Connection, judged: Mapping[bytes, Verdict]) -> None:
        rows = [(k, v.unsafe, json.dumps(v.categories), v.shortened) for k, v in judged.items()]
        with database:
            database.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?)", rows)


def _only_new(
    windows: Sequence[Sequence[Conversation]],
    keys: Sequence[Sequence[bytes]],
    known: Collection[bytes],
) -> list[dict[bytes, Conversation]]:
    """What is to be judged of each window: what neither is known nor was in an earlier one."""
    seen = set(known)
    parts = []
    for window, its_keys in zip(windows, keys, strict=True):
        pairs = zip(its_keys, window, strict=True)
        parts.append({key: each for key, each in pairs if key not in seen})
        seen |= parts[-1].keys()
    return parts


def _by_index(found: Sequence[Verdict | str]) -> tuple[dict[int, Verdict], dict[int, str]]:
    """Verdicts by index, and reasons by index."""
    places = list(enumerate(found))
    return (
        {index: each for index, each in places if isinstance(each, Verdict)},
        {index: each for index, each in places if isinstance(each, str)},
    )


def _sorted(
    verdicts: dict[int, Verdict], reasons: dict[int, str]
) -> tuple[dict[int, Verdict], dict[int, str]]:
    return verdicts, dict(sorted(reasons.items()))


def _in_chunks(keys: Sequence[bytes], *, title: str, shown: bool) -> Iterator[Sequence[bytes]]:
    """The keys by `CHUNK_SIZE`; progress may be shown where there are several chunks."""
    starts = range(0, len(keys), CHUNK_SIZE)
    chunks = [keys[start : start + CHUNK_SIZE] for start in starts]
    if len(chunks) < 2:
        yield from chunks
    else:
        console = Console(stderr=True)
        yield from track(chunks, description=title, console=console, disable=not shown)
