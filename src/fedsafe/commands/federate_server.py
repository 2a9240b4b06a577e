"""`fedsafe federate server`: leads a training whose clients are on other machines."""

import argparse
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from fedsafe.commands.federate_sides import SideParser, check_configs, interrupted_by_sigterm
from fedsafe.federated.flower.control import Control, read_public_keys
from fedsafe.federated.flower.outcome import Outcome, has_ended
from fedsafe.federated.flower.private_line import write_private
from fedsafe.federated.flower.processes import Leashed, without_proxy
from fedsafe.federated.flower.reachability import Address, check_server, is_free
from fedsafe.federated.flower.server_app import SHOW_ON_STDIN
from fedsafe.federated.flower.superlink import KEYS_FILE, SECRET

_START_SECONDS = 60.0
_POLL_SECONDS = 0.2
_KEYS = "keys.json"
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def run_server(arguments: list[str]) -> None:
    """Check Flower's settings, start Flower, let it run the fit, and end it."""
    given, training = parser().parse_known_args(arguments)
    settings = _check(given)
    check_configs(training)
    state = Path(tempfile.mkdtemp(prefix="fedsafe-server-"))  # only its owner may enter
    with interrupted_by_sigterm():
        try:
            outcome = _lead(settings, training, state)
        except ValueError as error:
            raise ValueError(f"{error}; Flower's logs are in {state}") from None
        except BaseException:
            shutil.rmtree(state)
            raise
    shutil.rmtree(state)
    if outcome.error:
        raise ValueError(outcome.error)
    if outcome.status:
        sys.exit(outcome.status)


def parser() -> argparse.ArgumentParser:
    """The server's own options."""
    made = SideParser(
        "server",
        "Lead a training whose clients are on other machines, until its rounds are done.",
        "All options of fedsafe fit are options of this too, and those of the group fleet "
        "(--fleet.min_clients, --fleet.deadline_seconds …); see configs/federation.yaml.",
    )
    made.add_argument(
        "--listen",
        default="127.0.0.1:8000",
        metavar="HOST:PORT",
        help="Where nodes reach this server (default: %(default)s); 0.0.0.0 is all interfaces.",
    )
    made.add_argument(
        "--certificates",
        type=Path,
        metavar="DIR",
        help="Folder with ca.crt, server.crt and server.key, for TLS; see docs/federation.md.",
    )
    made.add_argument(
        "--node_keys",
        type=Path,
        metavar="DIR",
        help="Public key of each node that may take part, a folder or one file; the file's name is "
        "the only one that its node may have: ada.pub, or ada.key.pub, is ada's. Without them any "
        "node may come, under any name.",
    )
    made.add_argument(
        "--insecure",
        action="store_true",
        help="Listen to other machines without certificates: adapters travel in the open.",
    )
    return made


class Settings(NamedTuple):
    """What was chosen, checked."""

    listen: Address
    local: Address
    """Where this machine reaches it."""
    certificates: Path | None
    node_keys: dict[str, bytes]
    """By the name of the node."""

    @property
    def root_certificate(self) -> Path | None:
        """What the server's certificate is checked with."""
        return None if self.certificates is None else self.certificates / "ca.crt"


def _check(given: argparse.Namespace) -> Settings:
    listen = Address.read(given.listen)
    if given.certificates is None:
        if given.node_keys is not None:
            raise ValueError("--node_keys needs --certificates: keys are of no use without TLS")
        if not (listen.is_loopback or given.insecure):
            raise ValueError(
                f"--listen {listen} is open to other machines; give --certificates, or --insecure "
                "where the network itself is safe"
            )
    else:
        for name in ("ca.crt", "server.crt", "server.key"):
            if not (given.certificates / name).is_file():
                raise ValueError(
                    f"--certificates {given.certificates} has no {name}; make the three with "
                    "deploy/flower/make-certificates.sh"
                )
    if not is_free(listen):
        raise ValueError(f"another program listens on {listen} already; give another --listen")
    local = Address(_EVERYWHERE.get(listen.host, listen.host), listen.port)
    keys = {} if given.node_keys is None else read_public_keys(given.node_keys)
    return Settings(listen, local, given.certificates, keys)


def _lead(settings: Settings, training: list[str], state: Path) -> Outcome:
    """Run the fit in Flower; returns how it ended."""
    secret = secrets.token_hex(32)
    os.environ.update(without_proxy(settings.local.host))  # for all that is started here, too
    root = settings.root_certificate
    with (
        _superlink(settings, state, secret) as superlink,
        closing(Control(str(settings.local), secret, root)) as control,
        _superexec(settings, state) as superexec,
    ):
        for name, key in settings.node_keys.items():
            control.register(name, key)
        _admit_nodes(list(settings.node_keys.values()), state)
        control.start(training, cwd=Path.cwd(), state=state)
        return _wait(state, [superlink, superexec])


def _admit_nodes(keys: list[bytes], state: Path) -> None:
    """Let nodes in: before, one might come whose key was not registered yet."""
    shown = [b64encode(key).decode() for key in keys]
    write_private(state / _KEYS, json.dumps(shown or None).encode())


@contextmanager
def _superlink(settings: Settings, state: Path, secret: str) -> Iterator[Leashed]:
    """Flower's SuperLink, once it answers.

    Raises:
        ValueError: If it does not start, or its certificate does not fit.
    """
    command = [sys.executable, "-m", "fedsafe.federated.flower.superlink"]
    command += ["--host", settings.listen.host, "--port", str(settings.listen.port)]
    command += ["--isolation", "process", "--disable-runtime-dependency-installation"]
    command += ["--superexec-auth-secret-file", str(_secret_file(state))]
    if settings.certificates is None:
        command += ["--insecure"]
    else:
        folder = settings.certificates
        command += ["--ssl-ca-certfile", str(folder / "ca.crt")]
        command += ["--ssl-certfile", str(folder / "server.crt")]
        command += ["--ssl-keyfile", str(folder / "server.key")]
    if settings.node_keys:
        command += ["--enable-supernode-auth"]
    environment = {
        SECRET: secret,
        KEYS_FILE: str(state / _KEYS),
        "FLWR_HOME": str(state / "flower"),
    }
    superlink = Leashed(command, environment=environment, log=state / "superlink.log")
    try:
        until = time.monotonic() + _START_SECONDS
        while not check_server(settings.local, settings.root_certificate):
            if superlink.poll() is not None or time.monotonic() > until:
                raise ValueError(f"Flower's SuperLink does not start: {superlink.last_words()}")
            time.sleep(_POLL_SECONDS)
        yield superlink
    finally:
        superlink.stop()


@contextmanager
def _superexec(settings: Settings, state: Path) -> Iterator[Leashed]:
    """Flower's SuperExec, which starts the process that trains.

    What that process shows goes where this one shows: standard input is the one descriptor that
    Flower hands down untouched.
    """
    root = settings.root_certificate
    command = ["flower-superexec", "--runtime-api-address", str(settings.local)]
    command += ["--superexec-auth-secret-file", str(_secret_file(state))]
    command += ["--insecure"] if root is None else ["--root-certificates", str(root)]
    environment = {SHOW_ON_STDIN: "1", "FLWR_HOME": str(state / "flower")}
    sys.stdout.flush()
    superexec = Leashed(
        command, environment=environment, log=state / "superexec.log", stdin=sys.stdout.fileno()
    )
    try:
        yield superexec
    finally:
        superexec.stop()


def _secret_file(state: Path) -> Path:
    """What Flower's own processes prove themselves with."""
    file = state / "superexec.secret"
    if not file.exists():
        write_private(file, secrets.token_bytes(32))
    return file


def _wait(state: Path, processes: list[Leashed]) -> Outcome:
    """Wait for the fit to end.

    Raises:
        ValueError: If a process is gone before it has said how it ended.
    """
    while True:
        gone = has_ended(state) or any(each.poll() is not None for each in processes)
        outcome = Outcome.read(state)  # read after: what has ended has said what it had to say
        if outcome is not None:
            return outcome
        if gone:
            words = " / ".join(each.last_words() for each in processes)
            raise ValueError(
                f"the server's process ended without a word ({words}); go on with --ckpt_path last"
            )
        time.sleep(_POLL_SECONDS)
