"""A line between two processes of one user: a Unix socket that nobody else can use.

Its folder is open to the user alone, and both sides prove that they know a key from a file there.
Strings of bytes travel, nothing is ever unpickled. Standard library only.
"""

import hmac
import os
import secrets
import select
import socket
import stat
import tempfile
import time
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path

LONGEST_PATH = 100
"""Bytes; systems cut off the path of a socket from about there."""

_NONCE_BYTES = 32
_SHORT_BYTES = 256
_HANDSHAKE_SECONDS = 10.0


class WrongKeyError(OSError):
    """The other side does not know the key."""


def folder_for(file: Path) -> Path:
    """This user's folder for the line to whatever a file describes; made if it is missing.

    Raises:
        OSError: If it is not this user's alone, or its path is too long.
    """
    users = Path(tempfile.gettempdir()) / f"fedsafe-{os.getuid()}"
    name = blake2b(str(file.resolve()).encode(), digest_size=8).hexdigest()
    folder = users / name
    length = len(os.fsencode(folder / "socket"))
    if length > LONGEST_PATH:
        raise OSError(
            f"{folder} is too long for a Unix socket ({length} bytes with its name, at most "
            f"{LONGEST_PATH}); set TMPDIR to a shorter path"
        )
    for each in (users, folder):
        _make_private(each)
    return folder


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_private = stat.S_ISDIR(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
    if not is_private or found.st_uid != os.getuid():
        raise PermissionError(
            f"{folder} can be used by others than its user; remove it, or set TMPDIR to a folder "
            "of your own"
        )


def write_private(file: Path, content: bytes) -> None:
    """Write a file that its user alone can read, whole or not at all."""
    scratch = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as written:
        written.write(content)
    scratch.replace(file)


def new_key() -> bytes:
    """A random key."""
    return secrets.token_bytes(_NONCE_BYTES)


class Entrance:
    """Where calls come in, one after another.

    Args:
        path: Of the socket; what an earlier process left there is replaced.
        key: What callers must know.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self._path = path
        self._key = key
        self._socket = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        old = os.umask(0o177)  # nobody else may connect from the moment that it exists
        try:
            self._socket.bind(str(path))
        finally:
            os.umask(old)
        self._socket.listen()
        self._inode = path.stat().st_ino

    def is_found(self) -> bool:
        """Whether callers still come here: nobody has removed or replaced the socket."""
        try:
            return self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def next_call(self, timeout_seconds: float) -> Connection | None:
        """The next caller that knows the key, if one comes in time.

        Raises:
            OSError: If the caller does not know it, or is gone.
            EOFError: If the caller is gone.
        """
        if not select.select([self._socket], [], [], timeout_seconds)[0]:
            return None
        line = Connection(self._socket.accept()[0].detach())
        try:
            self._check(line)
        except BaseException:
            line.close()
            raise
        return line

    def _check(self, line: Connection) -> None:
        own = secrets.token_bytes(_NONCE_BYTES)
        line.send_bytes(own)
        told = receive(line, time.monotonic() + _HANDSHAKE_SECONDS, most=_SHORT_BYTES)
        other, proof = told[:_NONCE_BYTES], told[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, _proof(self._key, b"caller", own + other)):
            raise WrongKeyError("a caller does not know the key")
        line.send_bytes(_proof(self._key, b"called", own + other))

    def close(self) -> None:
        """Take no more calls."""
        if self.is_found():
            self._path.unlink()
        self._socket.close()


def call(path: Path, key: bytes, deadline: float) -> Connection:
    """Call who listens at a socket, and wait until it is one's turn.

    Args:
        path: Of the socket.
        key: What both sides must know.
        deadline: When to give up, as `time.monotonic` counts.

    Raises:
        OSError: If nobody listens, or who does does not know the key.
        EOFError: If who listens is gone.
        TimeoutError: If it takes too long.
    """
    made = socket.socket(socket.AF_UNIX)
    try:
        made.settimeout(max(0.01, deadline - time.monotonic()))
        made.connect(str(path))
        made.setblocking(True)
    except BaseException:
        made.close()
        raise
    line = Connection(made.detach())
    try:
        other = receive(line, deadline, most=_SHORT_BYTES)
        own = secrets.token_bytes(_NONCE_BYTES)
        line.send_bytes(own + _proof(key, b"caller", other + own))
        told = receive(line, deadline, most=_SHORT_BYTES)
        if not hmac.compare_digest(told, _proof(key, b"called", other + own)):
            raise WrongKeyError(f"who listens at {path} does not know the key")
    except BaseException:
        line.close()
        raise
    return line


def receive(line: Connection, deadline: float, *, most: int | None = None) -> bytes:
    """The next string of bytes.

    Args:
        line: From where.
        deadline: When to give up, as `time.monotonic` counts.
        most: Its length at most; a longer one is refused.

    Raises:
        TimeoutError: If it takes too long.
        OSError: If the other side is gone, or it is too long.
        EOFError: If the other side is gone.
    """
    if not line.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError("the other side took too long")
    return line.recv_bytes(most)


def _proof(key: bytes, who: bytes, nonces: bytes) -> bytes:
    return hmac.digest(key, who + nonces, "sha256")
