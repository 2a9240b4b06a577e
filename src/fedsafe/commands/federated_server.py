"""The server's side of `fedsafe federate server`: a fit whose clients train on other machines."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from fedsafe.commands.training import FedsafeCLI, make_cli, plain_errors
from fedsafe.data.folder_lock import only_here
from fedsafe.federated.remote.fleet import Fleet
from fedsafe.federated.remote.post import Post
from fedsafe.federated.remote.remote_data import RemoteData
from fedsafe.federated.remote.rounds import RemoteRounds

PATIENCE_SECONDS = 10.0
"""How long a server waits for one before it in the same run directory, which is just ending."""


def serve(arguments: list[str], post: Post) -> None:
    """Run the server of a federation to its end.

    Args:
        arguments: Options of `fedsafe fit` and those of the group `fleet`. What only concerns the
            nodes (`data.path`, `data.filter`, `data.partition`) is ignored, and need not exist.
        post: Carries the letters.

    Raises:
        ValueError: If an option is wrong, or the run had to end: too few clients, too few updates.
    """
    command = ["fedsafe", "federate", "server", *arguments]
    own: dict[str, Any] = {"post": post, "given": command}
    with plain_errors(), ExitStack() as held:
        make_cli(["fit", *arguments], kind=ServerCLI, data=RemoteData, held=held, **own)


class ServerCLI(FedsafeCLI):
    """A fit with `RemoteRounds`."""

    rounds = RemoteRounds
    post: Post
    held: ExitStack
    """Keeps the run directory for this process."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the fleet to the settings of a fit."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Fleet, "fleet")

    def before_instantiate_classes(self) -> None:
        """Leave out what only the nodes need: its files need not be here."""
        config = self.config[self.subcommand]
        config.data.path = config.data.filter = config.data.partition = None
        run_dir = Path(config.run_dir)
        if run_dir.exists() or config.ckpt_path is None:  # a killed server is gone in a moment
            mine = only_here(
                run_dir, who="server", option="--run_dir", patience_seconds=PATIENCE_SECONDS
            )
            self.held.enter_context(mine)
        super().before_instantiate_classes()
        _keep_to_one(config.trainer)
        config.trainer.accumulate_grad_batches = 1  # it is the nodes that take steps in parts

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Tell the rounds whom to ask."""
        made = self.config_init[self.subcommand]
        made.federated.connect(made.fleet, self.post)
        return super().instantiate_trainer(**kwargs)


def _keep_to_one(trainer: Any) -> None:
    """Refuse several processes before a Trainer starts them; take one device of many.

    Raises:
        ValueError: If the Trainer's settings, or the launcher, ask for several.
    """
    if trainer.devices == "auto":
        trainer.devices = 1
    given = trainer.devices
    is_one = given in (1, "1") or (isinstance(given, list) and len(given) == 1)
    for name, fits in (("devices", is_one), ("num_nodes", trainer.num_nodes == 1)):
        if not fits:
            raise ValueError(
                f"the server of a federation is one process on one device, and trainer.{name} is "
                f"{getattr(trainer, name)}; set it to 1"
            )
