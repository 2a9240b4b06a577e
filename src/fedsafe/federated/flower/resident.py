"""The resident trainer of a node: `python -m fedsafe.federated.flower.resident NODE_FILE`.

Holds base, data and what the guard said from message to message. Takes one letter at a time, over a
private line, and ends when nobody has asked for a while. Started by torchrun it is several ranks:
the first one holds the line and hands each letter to the others.
"""

import logging
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from fedsafe.commands.client_setup import make_client_trainer
from fedsafe.federated.flower.node_file import Node
from fedsafe.federated.flower.private_line import Entrance, folder_for, receive
from fedsafe.federated.flower.resident_call import KEY, SOCKET
from fedsafe.federated.flower.resident_ranks import Ranks
from fedsafe.federated.remote.client_trainer import ClientTrainer
from fedsafe.federated.remote.letter import Letter

log = logging.getLogger("fedsafe.resident")

_POLL_SECONDS = 2.0
_LETTER_SECONDS = 60.0
"""How long a caller may take to hand over a letter, once it is its turn."""


def main(node_file: Path) -> int:
    """Serve until nobody has asked for a while; returns the exit status."""
    try:
        node = Node.read(node_file)
        ranks = Ranks()
        _set_up_log(ranks)
        # last, as a configuration names the server's directory
        arguments = [*node.arguments, "--run_dir", str(node_file.parent)]
        trainer = make_client_trainer(arguments, name=node.name)
    except Exception as error:  # noqa: BLE001 - who started it reads the last line alone
        if not isinstance(error, ValueError | OSError):
            traceback.print_exc()
        sys.stderr.write(f"{' '.join(str(error).split()) or type(error).__name__}\n")
        return 1
    if ranks.index > 0:
        ranks.follow(lambda data: trainer.answer(Letter.from_bytes(data)))
    else:
        folder = folder_for(node_file)
        entrance = Entrance(folder / SOCKET, (folder / KEY).read_bytes())
        log.info("ready: client %s", node.name)
        try:
            _serve(entrance, trainer, ranks, idle_seconds=node.idle_seconds)
        finally:
            entrance.close()
    ranks.part()
    return 0


def _set_up_log(ranks: Ranks) -> None:
    logging.basicConfig(
        level=logging.INFO if ranks.index == 0 else logging.WARNING,
        format="%(asctime)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("lightning.pytorch", "lightning.fabric"):  # a Trainer says hello at every visit
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _serve(
    entrance: Entrance, trainer: ClientTrainer, ranks: Ranks, *, idle_seconds: float
) -> None:
    asked = time.monotonic()
    while entrance.is_found() and not ranks.are_left_alone:
        left = asked + idle_seconds - time.monotonic()
        if left <= 0:
            log.info("ends: nobody has asked for %g seconds", idle_seconds)
            return
        try:
            line = entrance.next_call(min(left, _POLL_SECONDS))
            if line is None:
                continue
            with line:
                _answer(line, trainer, ranks)
        except (OSError, EOFError, ValueError) as error:
            log.info("a call came to nothing (%s)", type(error).__name__)
        asked = time.monotonic()
    log.info("ends: nobody can call any more")


def _answer(line: Connection, trainer: ClientTrainer, ranks: Ranks) -> None:
    data = receive(line, time.monotonic() + _LETTER_SECONDS)
    letter = Letter.from_bytes(data)
    started = time.perf_counter()
    if ranks.size > 1:
        ranks.hand(data)
        answer = trainer.answer(letter)
    else:
        answer = trainer.answer(letter, is_wanted=lambda: not line.poll())
    line.send_bytes(answer.to_bytes())
    log.info("answered: %s, %.3f s", answer.facts["kind"], time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
