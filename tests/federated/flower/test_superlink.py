"""What other machines may ask of the one port that Flower has for everything."""

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsafe.federated.flower.superlink import NodesAlone, may_ask

FLEET, CONTROL = "/v1/fleet/pull-messages", "/v1/control/start-run"


def asked(path: str, client: str | None, server: str = "10.0.0.1") -> dict[str, Any]:
    """A request as ASGI tells it."""
    return {
        "type": "http",
        "path": path,
        "client": None if client is None else (client, 50000),
        "server": (server, 8000),
    }


@pytest.mark.parametrize(
    ("path", "client", "allowed"),
    [
        (FLEET, "10.0.0.9", True),
        (CONTROL, "10.0.0.9", False),
        ("/v1/runtime/acquire-task", "10.0.0.9", False),
        ("/v1/fleet/../control/start-run", "127.0.0.1", True),
        ("/v1/fleet", "10.0.0.9", False),
        ("/docs", "10.0.0.9", False),
        (CONTROL, "127.0.0.1", True),
        (CONTROL, "127.0.0.53", True),
        (CONTROL, "::1", True),
        (CONTROL, "::ffff:127.0.0.1", True),
        (CONTROL, "::ffff:10.0.0.9", False),
        (CONTROL, "10.0.0.1", True),
        (CONTROL, None, False),
        (CONTROL, "a-name", False),
        (CONTROL, "", False),
    ],
)
def test_other_machines_reach_the_nodes_part_alone(
    path: str, client: str | None, allowed: bool
) -> None:
    assert may_ask(asked(path, client)) is allowed


@pytest.mark.parametrize(
    ("kind", "answer"), [("http", "http.response.start"), ("websocket", "websocket.close")]
)
def test_what_is_refused_never_reaches_the_application(kind: str, answer: str) -> None:
    sent: list[Any] = []

    async def application(*_: Any) -> None:
        pytest.fail("the application was asked")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        pytest.fail("the request was read")

    scope = {**asked(CONTROL, "10.0.0.9"), "type": kind}
    asyncio.run(NodesAlone(application)(scope, receive, send))
    assert sent[0]["type"] == answer
    assert sent[0].get("status", 403) == 403


def answer(gate: NodesAlone, scope: dict[str, Any]) -> int:
    """Status of what a gate answers; the application answers 200."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    asyncio.run(gate(scope, receive, send))
    return sent[0]["status"]


async def application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        pytest.param(CONTROL, [(b"x-fedsafe-secret", b"right")], 200, id="the-secret"),
        pytest.param(CONTROL, [(b"x-fedsafe-secret", b"wrong")], 403, id="another-secret"),
        pytest.param(CONTROL, [], 403, id="no-secret"),
        pytest.param(FLEET, [], 200, id="a-node-needs-none"),
    ],
)
def test_another_user_of_the_servers_machine_needs_the_secret(
    path: str, headers: list[tuple[bytes, bytes]], expected: int
) -> None:
    scope = {**asked(path, "127.0.0.1"), "headers": headers}
    assert answer(NodesAlone(application, "right"), scope) == expected


def test_the_secret_is_of_no_use_from_another_machine() -> None:
    scope = {**asked(CONTROL, "10.0.0.9"), "headers": [(b"x-fedsafe-secret", b"right")]}
    assert answer(NodesAlone(application, "right"), scope) == 403


@pytest.mark.parametrize(
    ("listed", "key", "expected"),
    [
        pytest.param('["ada", "bob"]', b"ada", 200, id="listed"),
        pytest.param('["ada", "bob"]', b"cyd", 410, id="not-listed"),
        pytest.param('["ada", "bob"]', None, 410, id="no-key"),
        pytest.param("null", b"cyd", 200, id="anyone-may"),
        pytest.param(None, b"ada", 503, id="not-ready-yet"),
    ],
)
def test_a_node_is_let_in_by_its_key(
    tmp_path: Path, listed: str | None, key: bytes | None, expected: int
) -> None:
    file = tmp_path / "keys.json"
    if listed is not None:
        file.write_text(listed)
    headers = [] if key is None else [(b"flwr-public-key", key)]
    scope = {**asked(FLEET, "10.0.0.9"), "headers": headers}
    assert answer(NodesAlone(application, None, file), scope) == expected


@pytest.fixture(scope="module")
def superlink() -> Iterator[str]:
    """The address of a SuperLink on loopback."""
    pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fedsafe.federated.flower.superlink", "--insecure"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    process = subprocess.Popen([*command, *options], env={**os.environ, **quiet})
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "the SuperLink ended"
        with socket.socket() as caller:
            if caller.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("the SuperLink did not start")


def status(url: str, *, caller: str | None) -> tuple[int, bytes]:
    """Ask; `caller` is where the request comes from, as a proxy on this machine would say."""
    headers = {"content-type": "application/protobuf"}
    if caller is not None:
        headers["x-forwarded-for"] = caller
    request = urllib.request.Request(url, data=b"", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.flower
def test_flowers_superlink_lists_nodes_for_its_own_machine_and_not_for_another(
    superlink: str,
) -> None:
    list_nodes = f"{superlink}/v1/control/list-nodes"
    assert status(list_nodes, caller=None)[0] == 200
    assert status(list_nodes, caller="10.0.0.9") == (
        403,
        b"only nodes are answered from other machines; run this on the server's own",
    )


@pytest.mark.flower
def test_a_node_elsewhere_is_asked_for_its_signature(superlink: str) -> None:
    code, text = status(f"{superlink}{FLEET}", caller="10.0.0.9")
    assert code == 401
    assert b"Invalid SuperNode authentication" in text
