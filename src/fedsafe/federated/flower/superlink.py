"""Flower's SuperLink, which serves other machines' nodes alone.

`python -m fedsafe.federated.flower.superlink` takes the options of `flower-superlink`.

Flower 1.41 answers nodes, operators and its own processes on one port and asks operators for no
password: whoever reaches the port could start a run, which is code that the server and every node
execute, or register a node key of their own. So here only the nodes' part of the port is open to
other machines; the rest is for the machine that the SuperLink runs on, and of its users only for
the one who shows the secret that the SuperLink found in its environment, if it found one.

It may also find there a file that lists the nodes' keys. Until that file exists nodes are asked to
come again; then a node whose key is not listed is told so, where Flower would not say why.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SECRET = "FEDSAFE_CONTROL_SECRET"
"""In the environment: what operators must show."""
HEADER = b"x-fedsafe-secret"
KEYS_FILE = "FEDSAFE_NODE_KEYS"
"""In the environment: file with the public keys of the nodes that may take part, as a JSON list of
texts, or `null` for any."""
_KEY_HEADER = b"flwr-public-key"
UNKNOWN_KEY = b"the server does not know this node's key"
_NOT_YET = b"the server is not ready"

OPERATORS_PREFIX = "/v1/control/"
OPEN_PREFIX = "/v1/fleet/"
"""Where nodes are answered; with TLS and node keys, each of their requests is signed."""
_FINE = 200
REFUSAL = b"only nodes are answered from other machines; run this on the server's own"


class NodesAlone:
    """Answers other machines 403 outside the nodes' part, and operators without the secret.

    Args:
        app: What answers otherwise (ASGI).
        secret: What operators must show; None asks for none.
        keys_file: Lists the nodes' keys; None lets Flower decide alone.
    """

    def __init__(self, app: App, secret: str | None = None, keys_file: Path | None = None) -> None:
        self.app = app
        self._secret = secret
        self._keys_file = keys_file
        self._keys: frozenset[bytes] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        status, why = self._judge(scope)
        if status == _FINE:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": why})

    def _judge(self, scope: Scope) -> tuple[int, bytes]:
        """Status of the answer, and why, if it is a refusal."""
        if not (may_ask(scope) and self._knows_secret(scope)):
            return 403, REFUSAL
        if self._keys_file is None or not scope["path"].startswith(OPEN_PREFIX):
            return _FINE, b""
        if not self._keys_file.exists():
            return 503, _NOT_YET
        if self._keys is None:
            listed = json.loads(self._keys_file.read_text())
            self._keys = frozenset(key.encode() for key in listed or ())
        if self._keys and dict(scope["headers"]).get(_KEY_HEADER, b"") not in self._keys:
            return 410, UNKNOWN_KEY
        return _FINE, b""

    def _knows_secret(self, scope: Scope) -> bool:
        if self._secret is None or not scope["path"].startswith(OPERATORS_PREFIX):
            return True
        shown = dict(scope["headers"]).get(HEADER, b"")
        return hmac.compare_digest(shown, self._secret.encode())


def may_ask(scope: Scope) -> bool:
    """Whether a request is a node's, or comes from the machine that it reached."""
    if scope["path"].startswith(OPEN_PREFIX):
        return True
    client, server = scope.get("client"), scope.get("server")
    if client is None or server is None:
        return False
    caller, here = _address(client[0]), _address(server[0])
    return caller is not None and (caller.is_loopback or caller == here)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def main() -> None:
    """Run `flower-superlink` with the arguments of this process."""
    from flwr.superlink import extensions
    from flwr.superlink.cli.flower_superlink import flower_superlink

    secret, keys_file = os.environ.pop(SECRET, None), os.environ.get(KEYS_FILE)
    settings = {"secret": secret, "keys_file": Path(keys_file) if keys_file else None}

    def configure(app: Any) -> None:
        """Flower's hook for what is added to its app; what is added last is asked first."""
        app.add_middleware(NodesAlone, **settings)

    extensions.configure_app = configure
    flower_superlink()


if __name__ == "__main__":
    main()
