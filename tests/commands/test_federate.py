"""What `fedsafe federate` refuses before it starts anything, each in one line."""

import json
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")

from certificates import write_certificates, write_node_key
from plain_server import serving

from fedsafe.cli import main
from fedsafe.commands import federate_client, federate_server
from fedsafe.data.folder_lock import only_here
from fedsafe.federated.flower.outcome import Outcome
from fedsafe.federated.flower.supernode import REFUSED

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(federate_server, "Leashed", fail)
    monkeypatch.setattr(federate_client, "Leashed", fail)
    monkeypatch.setattr("fedsafe.federated.flower.resident_call.warm_up", fail)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def certificates() -> Path:
    """A folder of certificates, and beside it the key of a node."""
    folder = write_certificates(Path("certificates"))
    write_node_key(Path("ada"))
    return folder


def refusal(arguments: list[str], capsys: Captured) -> str:
    """The one line that a command ends with."""
    assert main(["federate", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--listen nowhere", "'nowhere' is no address; give HOST:PORT"),
        ("--listen 0.0.0.0:8000", "is open to other machines; give --certificates, or --insecure"),
        ("--node_keys ada.pub", "--node_keys needs --certificates"),
        ("--certificates other", "--certificates other has no ca.crt; make the three with"),
        ("--certificates certificates --node_keys other", "No such file or directory: 'other'"),
        ("--certificates certificates --node_keys empty", "empty holds no public key"),
        ("--certificates certificates --node_keys ada", "ada is no public key of a node"),
    ],
    ids=["address", "open", "keys-alone", "no-folder", "no-keys", "no-key-in-it", "private"],
)
def test_a_server_refuses_wrong_settings(
    arguments: str, words: str, certificates: Path, capsys: Captured
) -> None:
    Path("empty").mkdir()
    assert words in refusal(["server", *arguments.split()], capsys)


@pytest.mark.parametrize("missing", ["ca.crt", "server.crt", "server.key"])
def test_a_server_names_the_certificate_that_is_missing(
    missing: str, certificates: Path, capsys: Captured
) -> None:
    (certificates / missing).unlink()
    assert f"has no {missing}" in refusal(["server", "--certificates", "certificates"], capsys)


def test_a_server_refuses_a_port_in_use(capsys: Captured) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = refusal(["server", "--listen", address], capsys)
    assert f"another program listens on {address} already; give another --listen" in said


def test_a_server_reads_the_keys_of_a_folder_and_of_a_file(certificates: Path) -> None:
    write_node_key(Path("bob"))
    folder = Path("keys")
    folder.mkdir()
    for name in ("ada.pub", "bob.pub"):
        (folder / name).write_bytes(Path(name).read_bytes())
    one, two = (federate_server.read_public_keys(path) for path in (Path("ada.pub"), folder))
    assert list(two) == ["ada", "bob"]
    assert one == {"ada": two["ada"]}
    assert two["ada"] != two["bob"]
    assert two["ada"].startswith(b"-----BEGIN PUBLIC KEY-----")


@pytest.mark.parametrize("name", ["ada.key.pub", "copy.pub"])
def test_two_nodes_with_one_name_or_one_key_are_refused(certificates: Path, name: str) -> None:
    folder = Path("keys")
    folder.mkdir()
    for file in ("ada.pub", name):
        (folder / file).write_bytes(Path("ada.pub").read_bytes())
    with pytest.raises(ValueError, match="has the name, or the key, of another node"):
        federate_server.read_public_keys(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--name a/b", "--name is 'a/b'; give letters, digits"),
        ("--name .hidden", "--name is '.hidden'; give letters"),
        ("--name ada --server ada", "'ada' is no address"),
        ("--name ada --server 10.0.0.1:80", "is another machine; give --root_certificate, or"),
        ("--name ada --key ada", "--key needs --root_certificate"),
        ("--name ada --root_certificate ca.crt", "there is no file ca.crt; give another"),
        ("--name ada --idle_minutes 0", "--idle_minutes is 0.0 and --num_ranks 1; give more"),
        ("--name ada --num_ranks 0", "and --num_ranks 0; give more than 0"),
    ],
    ids=["slash", "dot", "address", "open", "key-alone", "no-file", "idle", "ranks"],
)
def test_a_client_refuses_wrong_settings(
    arguments: str, words: str, certificates: Path, capsys: Captured
) -> None:
    assert words in refusal(["client", *arguments.split()], capsys)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("expired", "is refused: certificate has expired; renew it on the server"),
        ("another authority", "is refused: unable to get local issuer certificate; it does not"),
        ("plain", "speaks plain HTTP, and mine/ca.crt asks for TLS"),
    ],
)
def test_a_client_refuses_a_server_that_cannot_prove_itself(
    wrong: str, words: str, capsys: Captured
) -> None:
    mine = write_certificates(Path("mine"), ends=-1 if wrong == "expired" else 10, begins=-9)
    others = write_certificates(Path("theirs"))
    shown = {"expired": mine, "another authority": others, "plain": None}[wrong]
    with serving(shown) as port:
        arguments = ["--name", "ada", "--server", f"127.0.0.1:{port}"]
        said = refusal(["client", *arguments, "--root_certificate", "mine/ca.crt"], capsys)
    assert words in said
    assert not Path("runs").exists()


@pytest.mark.parametrize("side", ["server", "client --name ada"], ids=["server", "client"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--config none.yaml", "there is no file {folder}/none.yaml; give another --config"),
        ("--config=bad.yaml", "{folder}/bad.yaml is no YAML: while parsing"),
    ],
    ids=["no-file", "no-yaml"],
)
def test_a_configuration_that_cannot_be_read_is_refused_at_once(
    option: str, words: str, side: str, capsys: Captured
) -> None:
    Path("bad.yaml").write_text("model: [")
    said = refusal([*side.split(), *option.split()], capsys)
    assert words.format(folder=Path.cwd()) in said


@pytest.mark.parametrize("side", ["", "clients", "--config"])
def test_the_side_must_be_one_of_two(side: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["federate", *([side] if side else [])])
    assert caught.value.code == 2
    assert f"is either server or client; got {side!r}" in capsys.readouterr().err


def test_help_names_both_sides(capsys: Captured) -> None:
    assert main(["federate", "--help"]) == 0
    said = capsys.readouterr().out
    assert "fedsafe federate server" in said
    assert "fedsafe federate client" in said


@pytest.mark.parametrize("side", ["server", "client"])
def test_help_of_a_side_says_what_else_it_takes(side: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["federate", side, "--help"])
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"usage: fedsafe federate {side}" in said
    assert "ptions of fedsafe fit" in said


def test_without_flower_its_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    assert "Flower is not installed; pip install 'fedsafe[flower]'" in refusal(["server"], capsys)


@pytest.fixture
def settings() -> federate_client.Settings:
    arguments = ["--name", "ada", "--server", "localhost:8000", "--node_dir", "node"]
    return federate_client._check(federate_client.parser().parse_args(arguments))


def test_a_node_is_written_down_for_its_owner_alone(settings: federate_client.Settings) -> None:
    arguments = ["--name", "ada", "--idle_minutes", "2", "--num_ranks", "3"]
    given = federate_client.parser().parse_args(arguments)
    file = federate_client._write_node(settings, given, ["--config", "a.yaml"])
    assert json.loads(file.read_text()) == {
        "name": "ada",
        "arguments": ["--config", "a.yaml"],
        "cwd": str(Path.cwd()),
        "idle_seconds": 120.0,
        "num_ranks": 3,
    }
    assert file.parent.stat().st_mode & 0o077 == 0


def test_two_clients_cannot_share_a_folder(capsys: Captured) -> None:
    """They would have one trainer between them, and both answer under the later one's name."""
    before = Path("node/node.json")
    with only_here(before.parent, who="client", option="--node_dir"):
        before.write_text("of the other")
        said = refusal(["client", "--name", "bob", "--node_dir", "node"], capsys)
    assert "another client is at work in" in said
    assert "node; wait for it, or give another --node_dir" in said
    assert before.read_text() == "of the other"


@pytest.mark.parametrize(
    ("log", "key", "words"),
    [
        (f"INFO\n{REFUSED}the server sent code of its own\nINFO", None, "sent code of its own"),
        ("'410 Gone' for url", None, "localhost:8000 admits nodes by their keys"),
        ("'410 Gone' for url", Path("ada"), "does not know the key of this node; add ada.pub"),
        ("Exit Code: 608\nVersions differ.\n\nMore", None, "does not start: Versions differ."),
    ],
    ids=["code", "no-key", "unknown-key", "versions"],
)
def test_what_no_retry_mends_ends_a_client(
    log: str, key: Path | None, words: str, settings: federate_client.Settings
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        federate_client._check_end(log, settings._replace(key=key), connected=False)


@pytest.mark.parametrize(
    ("log", "connected", "words"),
    [
        ("Exit Code: 305\n[code: 2004] Failed to activate", False, "does not admit ada now"),
        ("Exit Code: 305\nFailed to initialize the connection", False, ""),
        ("SuperNode terminated gracefully.", True, ""),
        ("SuperNode terminated gracefully.", False, "the clocks of both machines must agree"),
    ],
    ids=["still-there", "connection", "new-server", "clocks"],
)
def test_what_a_retry_may_mend_does_not(
    log: str, connected: bool, words: str, settings: federate_client.Settings
) -> None:
    said = federate_client._check_end(log, settings, connected=connected)
    assert words in said if words else said == ""


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("Starting\nSuperNode ID: 7\n", True),
        ("SuperNode ID: 7\nConnection attempt failed, retrying\n", False),
        ("SuperNode ID: 7\nConnection attempt failed\nConnection successful after\n", True),
        ("Receiving: train message\nSent successfully\n", None),
        ("", None),
    ],
    ids=["connected", "lost", "back", "busy", "nothing"],
)
def test_the_log_tells_whether_a_node_is_connected(
    log: str, expected: bool | None, before: bool
) -> None:
    expected = before if expected is None else expected
    assert federate_client._is_connected(log, before) is expected


class Finished:
    """A process of Flower's that has ended, or not."""

    def __init__(self, status: int | None) -> None:
        self.status = status

    def poll(self) -> int | None:
        return self.status

    def last_words(self) -> str:
        return "out of memory"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def test_the_outcome_counts_even_where_flower_is_gone(state: Path) -> None:
    Outcome(1, "no client came").write(state)
    gone: list[Any] = [Finished(0), Finished(1)]
    assert federate_server._wait(state, gone) == Outcome(1, "no client came")


@pytest.mark.parametrize("who", ["flower", "server"])
def test_a_server_that_ends_without_a_word_is_told_of(who: str, state: Path) -> None:
    (state / "process").write_text("4194304" if who == "server" else "")  # no such process
    processes: list[Any] = [Finished(None), Finished(-9 if who == "flower" else None)]
    with pytest.raises(ValueError, match=r"ended without a word .*out of memory.*ckpt_path last"):
        federate_server._wait(state, processes)
