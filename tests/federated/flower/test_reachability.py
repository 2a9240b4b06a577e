"""What is said of a server that cannot be used, each in one line."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")

from certificates import write_certificates
from plain_server import serving

from fedsafe.federated.flower.reachability import Address, check_server, is_free

Serve = Callable[..., Address]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server, with the certificates of a folder or without; gives its address."""
    with ExitStack() as stack:

        def start(certificates: Path | None = None) -> Address:
            return Address("127.0.0.1", stack.enter_context(serving(certificates)))

        yield start


def test_a_server_is_found_with_and_without_tls(serve: Serve, tmp_path: Path) -> None:
    certificates = write_certificates(tmp_path / "right")
    assert check_server(serve(), None)
    assert check_server(serve(certificates), certificates / "ca.crt")
    assert not [file for file in tmp_path.iterdir() if file != certificates]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"begins": -9, "ends": -1}, "certificate has expired; renew it on the server"),
        ({"begins": 1, "ends": 9}, "not yet valid; look at the clocks of both machines"),
    ],
    ids=["expired", "not-yet"],
)
def test_a_certificate_out_of_its_time_is_refused(
    settings: dict[str, int], words: str, serve: Serve, tmp_path: Path
) -> None:
    certificates = write_certificates(tmp_path / "wrong", **settings)
    address = serve(certificates)
    with pytest.raises(ValueError, match=f"certificate of {address} is refused: .*{words}"):
        check_server(address, certificates / "ca.crt")


def test_a_certificate_of_another_authority_is_refused(serve: Serve, tmp_path: Path) -> None:
    address = serve(write_certificates(tmp_path / "theirs"))
    mine = write_certificates(tmp_path / "mine") / "ca.crt"
    with pytest.raises(ValueError, match=f"is refused: .*; it does not come from {mine}"):
        check_server(address, mine)


def test_a_certificate_of_another_host_is_refused(serve: Serve, tmp_path: Path) -> None:
    certificates = write_certificates(tmp_path / "other", hosts=("fed.example.org",))
    address = serve(certificates)._replace(host="localhost")
    with pytest.raises(ValueError, match="make one that names this host"):
        check_server(address, certificates / "ca.crt")


def test_tls_and_plain_http_are_told_apart(serve: Serve, tmp_path: Path) -> None:
    certificates = write_certificates(tmp_path / "right")
    plain, secure = serve(), serve(certificates)
    with pytest.raises(ValueError, match=f"{plain} speaks plain HTTP, and .* asks for TLS"):
        check_server(plain, certificates / "ca.crt")
    with pytest.raises(ValueError, match=f"{secure} speaks TLS; give .*--root_certificate"):
        check_server(secure, None)


def test_a_server_that_is_not_there_may_come_yet() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    assert check_server(Address("127.0.0.1", port), None) is False
    assert is_free(Address("127.0.0.1", port))


def test_what_is_no_server_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            caller, _ = listener.accept()
            with caller:
                caller.recv(1000)
                caller.sendall(b"SSH-2.0-OpenSSH")

        Thread(target=answer, daemon=True).start()
        with pytest.raises(ValueError, match=r"127.0.0.1:\d+ is no server of Flower's"):
            check_server(Address("127.0.0.1", port), None)


def test_what_is_no_certificate_is_refused(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("no certificate")
    with pytest.raises(ValueError, match=r"ca.crt is no certificate; give the ca.crt file"):
        check_server(serve(), tmp_path / "ca.crt")


def test_a_port_in_use_is_not_free(serve: Serve) -> None:
    assert not is_free(serve())


def test_a_host_that_is_not_this_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.1:8000"):
        is_free(Address("192.0.2.1", 8000))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", Address("127.0.0.1", 80)),
        ("fed.example.org:8000", Address("fed.example.org", 8000)),
        ("[::1]:8000", Address("::1", 8000)),
    ],
)
def test_an_address_is_read_and_written(text: str, address: Address) -> None:
    assert Address.read(text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["", "host", ":80", "host:", "host:x", "host:0", "host:65536"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no address; give HOST:PORT"):
        Address.read(text)


@pytest.mark.parametrize(
    ("host", "expected"), [("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_which_addresses_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert Address(host, 1).is_loopback is expected
