"""Flower's SuperLink, which serves other machines' nodes alone.

`python -m fedsafe.federated.flower.superlink` takes the options of `flower-superlink`.

Flower 1.41 answers nodes, operators and its own processes on one port and asks operators for no
password: whoever reaches the port could start a run, which is code that the server and every node
execute, or register a node key of their own. So here only the nodes' part of the port is open to
other machines; the rest is for the machine that the SuperLink runs on.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PREFIX = "/v1/fleet/"
"""Where nodes are answered; with TLS and node keys, each of their requests is signed."""
REFUSAL = b"only nodes are answered from other machines; run this on the server's own"


class NodesAlone:
    """Answers other machines 403 outside the nodes' part.

    Args:
        app: What answers otherwise (ASGI).
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan" or may_ask(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})


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

    def configure(app: Any) -> None:
        """Flower's hook for what is added to its app; what is added last is asked first."""
        app.add_middleware(NodesAlone)

    extensions.configure_app = configure
    flower_superlink()


if __name__ == "__main__":
    main()
