"""The node's end in Flower: a short-lived process a message, which hands it to the resident.

It must start in an instant: neither torch nor lightning is imported here. What goes wrong is told
by its kind alone; the text of an error may quote a sample, and Flower would send it.
"""

import logging
import sys
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsafe.federated.flower.records import from_records, to_records
from fedsafe.federated.flower.resident_call import ask
from fedsafe.federated.remote.facts import Failure

NODE_FILE = "node-file"
"""Entry of the node's configuration in Flower: where `fedsafe federate client` wrote the node."""
ANSWERED = "fedsafe answered after "
"""Begins a line of the node's log."""

_log = logging.getLogger(__name__)

app = ClientApp()


@app.train()
def answer(message: Message, context: Context) -> Message:
    """Let the node answer the letter."""
    start = time.monotonic()
    try:
        node_file = Path(str(context.node_config[NODE_FILE]))
        letter = ask(node_file, from_records(message.content), timeout_seconds=message.metadata.ttl)
    except Exception as error:  # noqa: BLE001 - whatever it is, only its kind may leave
        _log.exception("the node could not answer")
        letter = Failure(type(error).__name__).letter()
    sys.stderr.write(f"{ANSWERED}{time.monotonic() - start:.3f} s\n")
    return Message(to_records(letter), reply_to=message)
