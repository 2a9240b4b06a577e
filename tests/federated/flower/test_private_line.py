import os
import pickle
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path

import pytest

from fedsafe.federated.flower.private_line import (
    Entrance,
    WrongKeyError,
    call,
    folder_for,
    new_key,
    receive,
    write_private,
)

KEY = b"k" * 32


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose path is short enough for a socket."""
    return tmp_path_factory.mktemp("line")


@pytest.fixture
def entrance(folder: Path) -> Iterator[Entrance]:
    made = Entrance(folder / "socket", KEY)
    yield made
    made.close()


@pytest.fixture
def echoing(entrance: Entrance) -> Iterator[list[str]]:
    """Sends back what callers say, in a thread; the list gets the errors of calls."""
    errors: list[str] = []
    ends = threading.Event()

    def serve() -> None:
        while not ends.is_set():
            try:
                line = entrance.next_call(0.05)
                if line is not None:
                    with line:
                        line.send_bytes(b"echo " + receive(line, soon()))
            except (OSError, EOFError) as error:
                errors.append(type(error).__name__)

    thread = threading.Thread(target=serve)
    thread.start()
    yield errors
    ends.set()
    thread.join()


def soon() -> float:
    return time.monotonic() + 5


def said(line: Connection, text: bytes) -> bytes:
    with line:
        line.send_bytes(text)
        return receive(line, soon())


def test_who_knows_the_key_is_answered(echoing: list[str], folder: Path) -> None:
    for _ in range(2):
        assert said(call(folder / "socket", KEY, soon()), b"hi") == b"echo hi"
    big = os.urandom(2_000_000)
    assert said(call(folder / "socket", KEY, soon()), big) == b"echo " + big
    assert echoing == []


def test_who_does_not_know_the_key_is_refused_and_the_next_is_served(
    echoing: list[str], folder: Path
) -> None:
    with pytest.raises(EOFError):
        call(folder / "socket", b"x" * 32, soon())
    assert said(call(folder / "socket", KEY, soon()), b"hi") == b"echo hi"
    assert echoing == ["WrongKeyError"]


def test_an_answer_to_another_challenge_is_refused(echoing: list[str], folder: Path) -> None:
    with Client(str(folder / "socket")) as heard:  # what a listener could have overheard
        heard.recv_bytes()
        heard.send_bytes(b"n" * 64)
        with pytest.raises(EOFError):
            heard.recv_bytes()
    with Client(str(folder / "socket")) as long:
        long.recv_bytes()
        long.send_bytes(b"n" * 10_000)
        with pytest.raises((EOFError, OSError)):
            long.recv_bytes()
    time.sleep(0.1)
    assert echoing == ["WrongKeyError", "OSError"]


@pytest.mark.parametrize(
    "answer",
    [lambda told: b"p" * 32, lambda told: told[32:]],
    ids=["made-up", "the-callers-own-proof"],
)
def test_who_listens_must_know_the_key_too(folder: Path, answer: Callable[[bytes], bytes]) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen()

        def pretend() -> None:
            with Connection(listening.accept()[0].detach()) as line:
                line.send_bytes(b"n" * 32)
                line.send_bytes(answer(line.recv_bytes()))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(WrongKeyError, match=r"who listens at .* does not know the key"):
            call(folder / "socket", KEY, soon())
        thread.join()


def test_what_arrives_is_bytes_and_never_unpickled(echoing: list[str], folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.system, (f"touch {folder}/was-here",)

    packed = pickle.dumps(Evil())
    assert said(call(folder / "socket", KEY, soon()), packed) == b"echo " + packed
    with Client(str(folder / "socket")) as line:
        line.recv_bytes()
        line.send(Evil())  # as multiprocessing sends objects
        with pytest.raises(EOFError):
            line.recv_bytes()
    assert not (folder / "was-here").exists()


def test_only_the_user_can_reach_the_socket(entrance: Entrance, folder: Path) -> None:
    assert stat.S_IMODE((folder / "socket").stat().st_mode) == 0o600


def test_a_call_to_nobody_fails_at_once(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        call(folder / "socket", KEY, soon())
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(folder / "socket"))
    with pytest.raises(ConnectionRefusedError):
        call(folder / "socket", KEY, soon())


def test_what_a_killed_process_left_is_replaced(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(folder / "socket"))
    entrance = Entrance(folder / "socket", KEY)
    assert entrance.next_call(0.01) is None
    entrance.close()
    assert not (folder / "socket").exists()


def test_an_entrance_notices_that_it_was_replaced(entrance: Entrance, folder: Path) -> None:
    assert entrance.is_found()
    (folder / "socket").rename(folder / "old")
    assert not entrance.is_found()
    other = Entrance(folder / "socket", KEY)
    assert not entrance.is_found()
    entrance.close()
    assert other.is_found()  # closing the old one left it alone
    other.close()


def test_a_call_is_given_up_in_time(entrance: Entrance, folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        call(folder / "socket", KEY, started + 0.2)  # nobody takes calls
    assert 0.15 < time.monotonic() - started < 2


def test_each_file_has_a_folder_of_the_users_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    found = [folder_for(Path(name)) for name in ("a/node.json", "b/node.json", "c/../a/node.json")]
    assert found[0] == found[2] != found[1]
    for each in (found[0], found[0].parent):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700
    assert found[0].parent.parent == folder


@pytest.mark.parametrize("broken", ["open to others", "a link", "a file"])
def test_a_folder_that_others_may_use_is_refused(
    broken: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    users = folder / f"fedsafe-{os.getuid()}"
    if broken == "open to others":
        users.mkdir()
        users.chmod(0o755)
    elif broken == "a link":
        (folder / "elsewhere").mkdir(mode=0o700)
        users.symlink_to(folder / "elsewhere")
    else:
        users.touch(0o700)
    with pytest.raises((PermissionError, FileExistsError), match=r"can be used by others|exists"):
        folder_for(Path("node.json"))


def test_a_path_too_long_for_a_socket_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 80)))
    with pytest.raises(OSError, match=r"too long for a Unix socket \(.* at most 100\); set TMPDIR"):
        folder_for(Path("node.json"))


def test_a_key_is_random_and_for_the_user_alone(folder: Path) -> None:
    keys = {new_key() for _ in range(5)}
    assert len(keys) == 5
    assert {len(key) for key in keys} == {32}
    write_private(folder / "key", KEY)
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert (folder / "key").read_bytes() == KEY
    assert [each.name for each in folder.iterdir()] == ["key"]
