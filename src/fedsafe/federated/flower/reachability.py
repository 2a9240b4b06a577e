"""Whether a server of ours answers at an address, and if not, why, in one line."""

import errno
import socket
import ssl
from pathlib import Path
from typing import NamedTuple

_TIMEOUT_SECONDS = 5.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    @staticmethod
    def read(text: str) -> "Address":
        """Read `HOST:PORT`.

        Raises:
            ValueError: If it is none.
        """
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"{text!r} is no address; give HOST:PORT, such as 10.0.0.1:8000")
        return Address(host, int(port))

    def __str__(self) -> str:
        """As it was given."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in LOOPBACK


def check_server(address: Address, root_certificate: Path | None) -> bool:
    """Whether a server answers there; False where nobody does, which may change.

    Args:
        address: Where.
        root_certificate: What its certificate must come from; None expects plain HTTP.

    Raises:
        ValueError: If its certificate is refused, or it speaks TLS where plain HTTP is expected, or
            the other way round.
    """
    try:
        connection = socket.create_connection(address, _TIMEOUT_SECONDS)
    except OSError:
        return False
    with connection:
        try:
            if root_certificate is None:
                _greet_plainly(connection, address)
            else:
                _shake_hands(connection, address, root_certificate)
        except (ConnectionError, TimeoutError):
            return False
    return True


def _shake_hands(connection: socket.socket, address: Address, root_certificate: Path) -> None:
    try:
        context = ssl.create_default_context(cafile=root_certificate)
    except ssl.SSLError:
        raise ValueError(f"{root_certificate} is no certificate; give the ca.crt file") from None
    try:
        context.wrap_socket(connection, server_hostname=address.host).close()
    except ssl.SSLCertVerificationError as error:
        raise ValueError(
            f"the certificate of {address} is refused: {error.verify_message.rstrip('.')}; "
            f"{_advice(error, root_certificate)}"
        ) from None
    except ssl.SSLEOFError:
        raise ConnectionError from None
    except ssl.SSLError:
        raise ValueError(
            f"{address} speaks plain HTTP, and {root_certificate} asks for TLS; start the server "
            "with --certificates"
        ) from None


_EXPIRED, _NOT_YET, _OTHER_NAME = 10, 9, (62, 64)
"""OpenSSL's numbers of what is wrong with a certificate."""


def _advice(error: ssl.SSLCertVerificationError, root_certificate: Path) -> str:
    if error.verify_code == _EXPIRED:
        return "renew it on the server"
    if error.verify_code == _NOT_YET:
        return "look at the clocks of both machines"
    if error.verify_code in _OTHER_NAME:
        return "make one that names this host, or reach it by a name that is in it"
    return f"it does not come from {root_certificate}, or is not the server that you mean"


def _greet_plainly(connection: socket.socket, address: Address) -> None:
    connection.sendall(f"GET /health HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
    try:
        answer = connection.recv(5)
    except ConnectionError:
        answer = b""
    if answer == b"HTTP/":
        return
    if _speaks_tls(address):
        raise ValueError(
            f"{address} speaks TLS; give the file that its certificate is checked with, "
            "--root_certificate"
        )
    if answer:
        raise ValueError(f"what answers at {address} is no server of Flower's")
    raise ConnectionError  # it is just ending, or not yet ready


def _speaks_tls(address: Address) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent: only whether there is a handshake
    try:
        with socket.create_connection(address, _TIMEOUT_SECONDS) as connection:
            context.wrap_socket(connection, server_hostname=address.host).close()
    except OSError:  # ssl.SSLError is one
        return False
    return True


def is_free(address: Address) -> bool:
    """Whether this machine could listen there.

    Raises:
        ValueError: If the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ValueError(f"cannot listen on {address} ({error.strerror})") from None
    return True
