"""The resident trainer of a node: `python -m fedsafe.federated.flower.resident NODE_FILE`.

Holds base, data and what the guard said from message to message, and answers over a private line.
Started by torchrun it is several ranks: the first one holds the line and hands each letter to the
others.
"""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from fedsafe.commands.client_setup import make_client_trainer
from fedsafe.federated.flower.node_file import Node
from fedsafe.federated.flower.private_line import Entrance, folder_for
from fedsafe.federated.flower.resident_call import CANNOT_START, KEY, SOCKET
from fedsafe.federated.flower.resident_loop import serve
from fedsafe.federated.flower.resident_ranks import Ranks
from fedsafe.federated.remote.client_trainer import ClientTrainer
from fedsafe.federated.remote.letter import Letter


def main(node_file: Path) -> int:
    """Serve until nobody has asked for a while; returns the exit status."""
    try:
        node = Node.read(node_file)
        ranks = Ranks()
        _set_up_log(ranks)
        # last, as a configuration names the server's directory
        arguments = [*node.arguments, "--run_dir", str(node_file.parent)]
        trainer = make_client_trainer(arguments, name=node.name)
    except Exception as error:  # noqa: BLE001 - who started it reads one line of the log
        if not isinstance(error, ValueError | OSError):
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"{CANNOT_START}{text}\n")
        return 1
    if ranks.index > 0:
        ranks.follow(lambda data: trainer.answer(Letter.from_bytes(data)))
    else:
        _serve(node, node_file, trainer, ranks)
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
    warnings.filterwarnings("ignore", ".*Skipping val loop.*")


def _serve(node: Node, node_file: Path, trainer: ClientTrainer, ranks: Ranks) -> None:
    def answer(letter: Letter, is_wanted: Callable[[], bool]) -> Letter:
        if ranks.size == 1:
            return trainer.answer(letter, is_wanted=is_wanted)
        ranks.hand(letter.to_bytes())
        return trainer.answer(letter)

    folder = folder_for(node_file)
    entrance = Entrance(folder / SOCKET, (folder / KEY).read_bytes())
    logging.getLogger("fedsafe.resident").info("ready: client %s", node.name)
    try:
        serve(
            entrance,
            answer,
            idle_seconds=node.idle_seconds,
            is_orphan=lambda: ranks.are_left_alone,
        )
    finally:
        entrance.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
