"""Asks a node's resident trainer, which stays alive between messages, and starts it where needed.

The process that asks lives for one message: only the standard library is imported here, torch and
lightning never. One lock is held as long as a resident is alive or being started: the starter takes
it and hands it down to the resident, so that it outlives the starter.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import blake2b
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

from fedsafe import __version__
from fedsafe.federated.flower.node_file import Node
from fedsafe.federated.flower.private_line import (
    call,
    folder_for,
    new_key,
    receive,
    write_private,
)
from fedsafe.federated.remote.facts import Greeting, NodeFacts
from fedsafe.federated.remote.letter import Letter

SOCKET, KEY, LOCK, PID, STARTED_FROM = "socket", "key", "lock", "pid", "started-from"
LOG = "resident.log"
CANNOT_START = "cannot start: "
"""What the line of the log begins with that says why."""

_LIBRARIES = ("torch", "lightning", "transformers", "peft")
_POLL_SECONDS = 0.05
_TRIES = 2
_START_SECONDS = 3600.0
_GRACE_SECONDS = 10.0
"""How long a trainer may take to end by itself, or to notice that nobody wants its answer."""


class ResidentError(RuntimeError):
    """The resident trainer could not be started, died, or took too long."""


def ask(node_file: Path, letter: Letter, *, timeout_seconds: float) -> Letter:
    """What the node's trainer answers; it is started if it is not there.

    A trainer that dies in between is started anew and asked once more: it remembers nothing, and
    the answer is the same.

    Args:
        node_file: Describes the node; `resident.log` is written beside it.
        letter: What the server says.
        timeout_seconds: For all of it.

    Raises:
        ResidentError: If the trainer cannot be started, dies twice or takes too long.
        ValueError: If the node file is none.
    """
    deadline = time.monotonic() + timeout_seconds
    for _ in range(_TRIES):
        with _line_to(node_file, deadline) as line:
            try:
                line.send_bytes(letter.to_bytes())
                return Letter.from_bytes(receive(line, deadline))
            except TimeoutError:
                break
            except (OSError, EOFError) as error:
                died = error
    else:
        raise ResidentError(
            f"the trainer died {_TRIES} times over one message; {_see(node_file)}"
        ) from died
    _end_if_stuck(folder_for(node_file))
    raise ResidentError(
        f"the trainer did not answer within {timeout_seconds:g} seconds; {_see(node_file)}"
    )


def warm_up(node_file: Path, *, timeout_seconds: float = _START_SECONDS) -> NodeFacts:
    """Start the node's trainer, wait until it is ready, and let it say what it holds.

    Raises:
        ResidentError: If it cannot be started, or takes too long.
        ValueError: If the node file is none.
    """
    letter = ask(node_file, Greeting(run="").letter(), timeout_seconds=timeout_seconds)
    return NodeFacts.read(letter.facts)


def stop(node_file: Path) -> None:
    """End the node's trainer, whatever it is doing, and wait until it is gone.

    Nothing is lost: it remembers nothing.

    Raises:
        ResidentError: If it does not end.
    """
    folder = folder_for(node_file)
    lock = _end(folder)
    shutil.rmtree(folder)  # a lock that is found removed counts for nothing
    _let_go(lock)


def _line_to(node_file: Path, deadline: float) -> Connection:
    """Call the trainer that belongs to the node as it is set up now; start it if need be."""
    recipe = _recipe(node_file)
    starts = 0
    while starts <= _TRIES and time.monotonic() < deadline:
        folder = folder_for(node_file)  # who stops a trainer removes it
        if _read(folder / STARTED_FROM) == recipe:
            try:
                return call(folder / SOCKET, _read(folder / KEY), deadline)
            except TimeoutError:
                break
            except (OSError, EOFError):
                pass  # it is being started, or it is gone
        lock = _end(folder, spared=recipe)
        if lock is None:
            time.sleep(_POLL_SECONDS)
            continue
        starts += 1
        _start(node_file, folder, recipe, lock, deadline)
    raise ResidentError(f"the trainer is busy, or not ready in time; {_see(node_file)}")


def _recipe(node_file: Path) -> bytes:
    """Digest of all that a trainer is started from, but for the data."""
    node = Node.read(node_file)
    digest = blake2b(node_file.read_bytes(), digest_size=16)
    for config in node.configs():
        digest.update(config.read_bytes() if config.is_file() else b"")
    digest.update(repr([sys.executable, __version__, *map(version, _LIBRARIES)]).encode())
    return digest.hexdigest().encode()


def _start(node_file: Path, folder: Path, recipe: bytes, lock: int, deadline: float) -> None:
    """Start a trainer, and wait until it can be called or has failed."""
    log = node_file.parent / LOG
    for name in (SOCKET, PID):  # of one that was killed
        (folder / name).unlink(missing_ok=True)
    write_private(folder / KEY, new_key())
    write_private(folder / STARTED_FROM, recipe)
    written = log.stat().st_size if log.exists() else 0
    try:
        process = _launch(Node.read(node_file), node_file, log, lock)
        write_private(folder / PID, str(process.pid).encode())
    finally:
        os.close(lock)
    while not (folder / SOCKET).exists():
        status = process.poll()
        if status is not None:
            raise ResidentError(f"the trainer could not be started: {_why(log, written)}")
        if time.monotonic() > deadline:
            break  # it goes on, for whoever calls next
        time.sleep(_POLL_SECONDS)
    process.returncode = 0  # it outlives this process: nobody waits for its end


def _launch(node: Node, node_file: Path, log: Path, lock: int) -> "subprocess.Popen[bytes]":
    with log.open("ab") as written:
        return subprocess.Popen(
            _command(node, node_file.absolute()),
            cwd=node.cwd,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,  # Flower ends the group of the process that asks
        )


def _command(node: Node, node_file: Path) -> list[str]:
    trainer = ["-m", "fedsafe.federated.flower.resident", str(node_file)]
    if node.num_ranks == 1:
        return [sys.executable, *trainer]
    ranks = ["--standalone", f"--nproc_per_node={node.num_ranks}"]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, *trainer]


def _lock_of(folder: Path) -> int | None:
    """The lock, if no trainer is alive or being started; it lasts while the descriptor is open."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == (folder / LOCK).stat().st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _end(folder: Path, *, spared: bytes = b"") -> int | None:
    """End the trainer that is alive or being started, if there is one.

    Args:
        folder: Where it is called.
        spared: What a trainer was started from that goes on; empty ends any.

    Returns:
        The lock; None where there is a trainer that is spared.
    """
    started = time.monotonic()
    told = 0
    while (lock := _lock_of(folder)) is None:
        time.sleep(_POLL_SECONDS)  # a starter that has just taken the lock clears the old number
        if spared and _read(folder / STARTED_FROM) == spared:
            return None
        process = int(_read(folder / PID) or 0)
        seconds = time.monotonic() - started
        if seconds > 2 * _GRACE_SECONDS:
            raise ResidentError(f"the trainer {process} does not end; end it by hand")
        late = seconds > _GRACE_SECONDS
        if process and (process != told or late):
            told = process
            _signal(process, signal.SIGKILL if late else signal.SIGTERM)
    return lock


def _let_go(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _signal(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process, number)  # it leads a group, of workers that prepare its batches


def _end_if_stuck(folder: Path) -> None:
    """End a trainer that does not come back from a visit whose caller has left."""
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        call(folder / SOCKET, _read(folder / KEY), deadline).close()
    except (OSError, EOFError):
        _let_go(_end(folder))


def _read(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _why(log: Path, start: int) -> str:
    """Why a trainer could not be started, by what its log says behind what was there before."""
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    said = [line.removeprefix(CANNOT_START) for line in lines if line.startswith(CANNOT_START)]
    return [*lines[-1:], *said[:1]][-1] if lines else f"it said nothing; {log} is its log"


def _see(node_file: Path) -> str:
    return f"{node_file.parent / LOG} says more"
