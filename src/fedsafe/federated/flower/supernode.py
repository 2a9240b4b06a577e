"""Runs Flower's SuperNode so that the server cannot send it code to run.

    python -m fedsafe.federated.flower.supernode <options of flower-supernode>

What a node runs is its own fedsafe; see `bundle`. It also asks for work more often than Flower's
own does, and is sooner back after its server was gone.
"""

import sys
import time
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from fedsafe.federated.flower.bundle import check_bundle

REFUSED = "fedsafe refuses: "
"""Begins the line that says why; the command reads it in the SuperNode's log."""

_PAUSE_SECONDS = 1.0
"""Between two questions for work, where Flower waits 3."""
_MAX_RETRY_SECONDS = 2.0
"""Between two attempts to reach a server that is gone, where Flower comes to wait 20."""
_HEARTBEAT_SECONDS = 15
"""A node that the server has not heard of for twice as long is gone; Flower's own take 30."""


def main() -> None:
    """Run `flower-supernode`; it ends where the server sends anything but fedsafe's app."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    _refuse_code()
    _make_quick()
    flower_supernode()


def _refuse_code() -> None:
    """Look at what the server sends before anything is done with it."""
    node = _module("flwr.supernode.start_client_internal")
    read = node.get_fused_config_from_fab

    def read_ours(content: Any, *others: Any) -> Any:
        try:
            check_bundle(content)
        except ValueError as error:
            sys.stderr.write(f"{REFUSED}{error}\n")
            sys.stderr.flush()
            sys.exit(1)
        return read(content, *others)

    node.get_fused_config_from_fab = read_ours


def _make_quick() -> None:
    """Shorten what Flower waits for; its settings are constants of its modules."""
    node = _module("flwr.supernode.start_client_internal")
    node.time = SimpleNamespace(sleep=lambda given: time.sleep(min(given, _PAUSE_SECONDS)))
    _module("flwr.supercore.retry.http_retry").MAX_RETRY_DELAY = _MAX_RETRY_SECONDS
    for name in ("flwr.supernode.fleet_http_connection", "flwr.supercore.heartbeat"):
        _module(name).HEARTBEAT_DEFAULT_INTERVAL = _HEARTBEAT_SECONDS


def _module(name: str) -> Any:
    return import_module(name)


if __name__ == "__main__":
    main()
