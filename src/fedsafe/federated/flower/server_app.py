"""The server's end in Flower: the process that trains, over Flower's grid."""

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsafe.federated.flower.outcome import Outcome, write_process
from fedsafe.federated.flower.post import FlowerPost

SHOW_ON_STDIN = "FEDSAFE_SHOW_ON_STDIN"
"""Set where standard input is what the user sees, and standard output is nowhere."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the server's fit, with the arguments of the run's configuration."""
    config = context.run_config
    os.chdir(str(config["cwd"]))
    arguments = json.loads(str(config["arguments"]))
    state = str(config["state"])
    if state:
        write_process(Path(state))
    with _shown_to_user():
        outcome = _serve(arguments, grid, debug=bool(os.environ.get("FEDSAFE_DEBUG")))
    if state:  # whoever started this waits for it, and ends Flower
        outcome.write(Path(state))
    elif outcome.error:
        sys.stderr.write(f"fedsafe federate server: {outcome.error}\n")
    if outcome.status:
        raise SystemExit(outcome.status)


@contextmanager
def _shown_to_user() -> Iterator[None]:
    """What is written meanwhile goes where the user looks; Flower would put it nowhere."""
    if not os.environ.get(SHOW_ON_STDIN):
        yield
        return
    flower = logging.getLogger("flwr")
    level, before = flower.level, {number: os.dup(number) for number in (1, 2)}
    try:
        flower.setLevel(logging.CRITICAL)
        for number in before:
            os.dup2(0, number)
        yield
    finally:
        flower.setLevel(level)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in before.items():
            os.dup2(copy, number)


def _serve(arguments: list[str], grid: Grid, *, debug: bool) -> Outcome:
    try:
        from fedsafe.commands.federated_server import serve

        serve(arguments, FlowerPost(grid))
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        return Outcome(1, str(error))
    except KeyboardInterrupt:
        return Outcome(130, "")
    except SystemExit as error:  # its parser has said what is wrong
        return Outcome(_status(error.code), "")
    except Exception as error:  # noqa: BLE001 - Flower would show it nowhere
        traceback.print_exc()
        return Outcome(1, f"it failed with {type(error).__name__}; the lines above say where")
    return Outcome(0, "")


def _status(code: Any) -> int:
    return code if isinstance(code, int) else int(code is not None)
