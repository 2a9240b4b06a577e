"""`fedsafe federate`: the same training, with the clients on machines of their own."""

import sys
from collections.abc import Callable

USAGE = """\
usage: fedsafe federate server [options]    on the machine that leads the training
       fedsafe federate client [options]    on each machine that has data

fedsafe federate server --help and fedsafe federate client --help explain the options.
"""


def run(name: str, arguments: list[str]) -> None:
    """Run one of the two sides."""
    side, *rest = arguments or [""]
    if side in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if side not in SIDES:
        sys.stderr.write(f"fedsafe {name} is either server or client; got {side!r}\n{USAGE}")
        sys.exit(2)
    _require_flower()
    SIDES[side](rest)


def _require_flower() -> None:
    try:
        import flwr  # noqa: F401
    except ImportError:
        raise ValueError("Flower is not installed; pip install 'fedsafe[flower]'") from None


def _server(arguments: list[str]) -> None:
    from fedsafe.commands.federate_server import run_server

    run_server(arguments)


def _client(arguments: list[str]) -> None:
    from fedsafe.commands.federate_client import run_client

    run_client(arguments)


SIDES: dict[str, Callable[[list[str]], None]] = {"server": _server, "client": _client}
