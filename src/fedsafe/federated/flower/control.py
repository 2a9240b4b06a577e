"""Starts a run on a SuperLink of ours, and tells it which nodes may take part."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

from fedsafe.federated.flower.bundle import build_bundle
from fedsafe.federated.flower.superlink import HEADER


class Control:
    """The owner's end of a SuperLink.

    Args:
        address: Host and port.
        secret: What the SuperLink asks for; see `superlink`.
        root_certificate: File that its certificate is checked with; None speaks plain HTTP.
    """

    def __init__(self, address: str, secret: str, root_certificate: Path | None) -> None:
        self._client = ControlHttpClient.from_server_address(
            address,
            root_certificate is None,
            None if root_certificate is None else root_certificate.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor("fedsafe"), _ShowSecret(secret)],
        )

    def register(self, name: str, public_key: bytes) -> None:
        """Let the node that holds the private part of a key take part, under this name alone."""
        with _errors_in_one_line():
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def start(self, arguments: list[str], *, cwd: Path, state: Path) -> None:
        """Start the server's fit.

        Args:
            arguments: Its options.
            cwd: Directory that its relative paths begin at.
            state: Folder in which it says how it ended.
        """
        content = build_bundle()
        settings: dict[str, bool | float | int | str] = {
            "arguments": json.dumps(arguments),
            "cwd": str(cwd),
            "state": str(state),
        }
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
            override_config=user_config_to_proto(settings),
        )
        with _errors_in_one_line():
            self._client.StartRun(request)

    def close(self) -> None:
        """Hang up."""
        self._client.close()


class _ShowSecret:
    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: Any, call_next: Any) -> Any:
        context.request.headers[HEADER.decode()] = self._secret
        return call_next(context)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise ValueError(f"Flower's SuperLink does not do what it is told ({error})") from None


def read_public_keys(path: Path) -> dict[str, bytes]:
    """Public keys of nodes by the name that a file gives its node: `ada.key.pub` is ada's.

    Args:
        path: A file, or a folder with `*.pub` files.

    Raises:
        ValueError: If there is none, a file holds none that Flower takes, or two files have the
            same name for a node, or the same key.
    """
    files = sorted(path.glob("*.pub")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no public key (*.pub); make one for each node")
    keys: dict[str, bytes] = {}
    for file in files:
        name, key = file.name.removesuffix(".pub").removesuffix(".key"), _read_public_key(file)
        if name in keys or key in keys.values():
            raise ValueError(f"{file} has the name, or the key, of another node; each has its own")
        keys[name] = key
    return keys


def _read_public_key(file: Path) -> bytes:
    try:
        key = load_ssh_public_key(file.read_bytes())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey) or not uses_nist_ec_curve(key):
        raise ValueError(
            f"{file} is no public key of a node; make one with ssh-keygen -t ecdsa -b 384"
        )
    return public_key_to_bytes(key)
