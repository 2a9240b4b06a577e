"""`fedsafe federate client`: lets this machine's data take part in a training led elsewhere."""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from fedsafe.commands.federate_sides import SideParser, check_configs, interrupted_by_sigterm
from fedsafe.data.folder_lock import only_here
from fedsafe.federated.flower import resident_call
from fedsafe.federated.flower.client_app import NODE_FILE
from fedsafe.federated.flower.node_file import NAME, Node
from fedsafe.federated.flower.processes import Leashed, free_port, without_proxy
from fedsafe.federated.flower.reachability import Address, check_server
from fedsafe.federated.flower.supernode import REFUSED

_POLL_SECONDS = 0.5
_AGAIN_SECONDS = 2.0
"""Pause before a server is tried again."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def run_client(arguments: list[str]) -> None:
    """Write the node's file, warm its resident up, and keep its SuperNode running."""
    given, training = parser().parse_known_args(arguments)
    settings = _check(given)
    check_configs(training)
    check_server(settings.server, settings.root_certificate)  # it may come later; a wrong one not
    here = only_here(settings.folder, who="client", option="--node_dir")
    with here, interrupted_by_sigterm():
        node_file = _write_node(settings, given, training)
        try:
            _warm_up(settings, node_file)
            _take_part(settings, node_file)
        finally:
            _end_resident(node_file)


def parser() -> argparse.ArgumentParser:
    """The client's own options."""
    made = SideParser(
        "client",
        "Let this machine's data take part in a training that a server leads. Runs until it is "
        "ended with Ctrl-C or SIGTERM; the server may come, go and come again meanwhile.",
        "Options of fedsafe fit that say what this node holds and computes on are options of this "
        "too: --config, the same file as the server's, --data.path, --data.filter, --trainer.….",
    )
    made.add_argument(
        "--name", required=True, help="This client's name, the same for ever and no other's."
    )
    made.add_argument(
        "--server",
        default="127.0.0.1:8000",
        metavar="HOST:PORT",
        help="Where the server listens (default: %(default)s).",
    )
    made.add_argument(
        "--root_certificate",
        type=Path,
        metavar="FILE",
        help="The ca.crt that the server's certificate is checked with, for TLS.",
    )
    made.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="Private key of this node, whose public key the server knows.",
    )
    made.add_argument(
        "--node_dir",
        type=Path,
        metavar="DIR",
        help="Folder for what the node writes (default: runs/node-NAME).",
    )
    made.add_argument(
        "--idle_minutes",
        type=float,
        default=30.0,
        help="The process that holds the base model ends when it has nothing to do for so long "
        "(default: %(default)s); the next message starts it again.",
    )
    made.add_argument(
        "--num_ranks",
        type=int,
        default=1,
        help="Processes that train together on this machine, one a GPU (default: %(default)s).",
    )
    made.add_argument(
        "--insecure",
        action="store_true",
        help="Reach another machine without TLS: adapters travel in the open.",
    )
    return made


class Settings(NamedTuple):
    """What was chosen, checked."""

    name: str
    server: Address
    root_certificate: Path | None
    key: Path | None
    folder: Path


def _check(given: argparse.Namespace) -> Settings:
    if not _NAME.fullmatch(given.name):
        raise ValueError(
            f"--name is {given.name!r}; give letters, digits, dots, dashes and underscores, up to "
            "64, beginning with a letter or a digit"
        )
    server = Address.read(given.server)
    if given.root_certificate is None:
        if given.key is not None:
            raise ValueError("--key needs --root_certificate: keys are of no use without TLS")
        if not (server.is_loopback or given.insecure):
            raise ValueError(
                f"--server {server} is another machine; give --root_certificate, or --insecure "
                "where the network itself is safe"
            )
    for option in ("root_certificate", "key"):
        file = getattr(given, option)
        if file is not None and not file.is_file():
            raise ValueError(f"there is no file {file}; give another --{option}")
    if given.idle_minutes <= 0 or given.num_ranks < 1:
        raise ValueError(
            f"--idle_minutes is {given.idle_minutes} and --num_ranks {given.num_ranks}; give more "
            "than 0 of both"
        )
    folder = given.node_dir or Path("runs") / f"node-{given.name}"
    return Settings(given.name, server, given.root_certificate, given.key, folder.absolute())


def _write_node(settings: Settings, given: argparse.Namespace, training: list[str]) -> Path:
    """What the resident and the ClientApp need to know of this node; only its owner may read it."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    settings.folder.chmod(0o700)
    file = settings.folder / NAME
    node = Node(
        settings.name,
        training,
        str(Path.cwd()),
        idle_seconds=given.idle_minutes * 60,
        num_ranks=given.num_ranks,
    )
    node.write(file)
    return file


def _warm_up(settings: Settings, node_file: Path) -> None:
    """Start the process that trains, and show what it holds.

    Raises:
        ValueError: If it cannot be started.
    """
    _say(f"{settings.name} reads its data and its base; {settings.folder} has the logs")
    try:
        facts = resident_call.warm_up(node_file)
    except resident_call.ResidentError as error:
        raise ValueError(str(error)) from None
    judged = ", ".join(f"{count:,} {what}" for what, count in facts.filtered.items())
    _say(
        f"{settings.name} trains on {facts.num_samples:,} samples with "
        f"{facts.num_answer_tokens:,} answer tokens" + (f"; its guard: {judged}" if judged else "")
    )


def _end_resident(node_file: Path) -> None:
    """End the process that trains, whatever it is doing."""
    try:
        resident_call.stop(node_file)
    except resident_call.ResidentError as error:
        _say(str(error))


def _take_part(settings: Settings, node_file: Path) -> None:
    """Keep a SuperNode running, until this process is told to end or the server refuses it."""
    said = ""
    while True:
        if check_server(settings.server, settings.root_certificate):
            problem = _run_supernode(settings, node_file)
        else:
            problem = f"nobody answers at {settings.server}; trying again until somebody does"
        if problem and problem != said:
            _say(problem)
        said = problem
        time.sleep(_AGAIN_SECONDS)


def _run_supernode(settings: Settings, node_file: Path) -> str:
    """Run a SuperNode until it ends, as it does where the server came back as a new one.

    Returns:
        Why it could not take part for now, if so.

    Raises:
        ValueError: If the server refuses it.
    """
    log = settings.folder / "supernode.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "fedsafe.federated.flower.supernode"]
    command += ["--superlink", str(settings.server), "--port", str(free_port())]
    command += ["--node-config", f"{NODE_FILE}={json.dumps(str(node_file))}"]
    if settings.root_certificate is None:
        command += ["--insecure"]
    else:
        command += ["--root-certificates", str(settings.root_certificate)]
    if settings.key is not None:
        command += ["--auth-supernode-private-key", str(settings.key)]
    environment = {"FLWR_HOME": str(settings.folder / "flower")}
    environment |= without_proxy(settings.server.host)
    supernode = Leashed(command, environment=environment, log=log)
    try:
        return _watch(supernode, settings)
    finally:
        supernode.stop()


_CONNECTED = "SuperNode ID: "
_AGAIN = "Connection successful"
_LOST = "Connection attempt failed"
_UNKNOWN_KEY = "410 Gone"
_NOT_NOW = "[code: 2004]"
"""What Flower says to a node whose key is in use, as after a crash until the server notices."""
_ENDED = "SuperNode terminated gracefully"
_FAILED = "Exit Code: "
_NO_CONNECTION = f"{_FAILED}305"


def _watch(supernode: Leashed, settings: Settings) -> str:
    """Say when the SuperNode is connected, and when it no longer is, until it has ended.

    Returns:
        See `_run_supernode`.

    Raises:
        ValueError: If the server refuses it, or it refuses the server.
    """
    connected = was_connected = False
    while supernode.poll() is None:
        before, connected = connected, _is_connected(supernode.log_end(), connected)
        if connected and not before:
            _say(f"{settings.name} takes part at {settings.server}")
        elif before and not connected:
            _say(f"{settings.server} does not answer any more; trying again until it does")
        was_connected = was_connected or connected
        time.sleep(_POLL_SECONDS)
    return _check_end(supernode.log_end(), settings, connected=was_connected)


def _is_connected(log: str, before: bool) -> bool:
    """What the last line about the connection says; as before where none does."""
    for line in reversed(log.splitlines()):
        if _LOST in line:
            return False
        if _CONNECTED in line or _AGAIN in line:
            return True
    return before


def _check_end(log: str, settings: Settings, *, connected: bool) -> str:
    """Raise what was wrong, where trying again is of no use; say it, where it is."""
    if REFUSED in log:
        raise ValueError(log.partition(REFUSED)[2].splitlines()[0])
    if _UNKNOWN_KEY in log and settings.key is None:
        raise ValueError(f"{settings.server} admits nodes by their keys; give this node's, --key")
    if _UNKNOWN_KEY in log:
        raise ValueError(
            f"{settings.server} does not know the key of this node; add {settings.key}.pub to the "
            "server's --node_keys"
        )
    if _NOT_NOW in log:
        return (
            f"{settings.server} does not admit {settings.name} now: another node has its key, or "
            "it was here a moment ago, or the server has no --node_keys; trying again"
        )
    if _FAILED in log and _NO_CONNECTION not in log:
        why = log.partition(_FAILED)[2].splitlines()
        raise ValueError(f"Flower's SuperNode does not start: {' '.join(why[1:2])}")
    if _ENDED in log and not connected:  # so it does where its signature is refused
        return (
            f"{settings.server} does not accept what {settings.name} signs; the clocks of both "
            "machines must agree within seconds; trying again"
        )
    return ""


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
