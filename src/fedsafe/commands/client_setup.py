"""From the options of `fedsafe fit` to one client on its own machine."""

import os
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from fedsafe.commands.launcher import fit_to_launcher
from fedsafe.commands.noise import quiet_known_noise
from fedsafe.commands.training import FedsafeCLI, TrainingParser
from fedsafe.federated.remote.client_trainer import ClientTrainer
from fedsafe.federated.remote.fleet import Fleet
from fedsafe.federated.remote.own_data import OwnData
from fedsafe.model.module import LoraLM

_TRAINER = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "deterministic",
    "benchmark",
    "detect_anomaly",
    "plugins",
)
"""What a visit takes from the section `trainer`; the rest is about rounds."""


def make_client_trainer(arguments: list[str], *, name: str) -> ClientTrainer:
    """What answers the server's letters, with its data read and its base loaded.

    A run directory may have been used before. It gets `filter.jsonl` and `filter.json`, and
    `rejected.jsonl` where rows are skipped.

    Args:
        arguments: Options of `fedsafe fit`, the same as the server's but for what is a node's own:
            `data.path`, `data.filter`, `run_dir`, hardware. What the server alone needs is ignored.
        name: Name of the client.

    Raises:
        ValueError: If an option is wrong, or data or base cannot be had.
    """
    quiet_known_noise()
    commands = {"fit": FedsafeCLI.subcommands()["fit"]}
    own = {"subcommands": staticmethod(lambda: commands), "given": arguments, "client": name}
    try:
        cli = type("NodeCLI", (_NodeCLI,), own)(
            LoraLM,
            OwnData,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": "fedsafe"},
            parser_class=_NodeParser,
            auto_configure_optimizers=False,
            args=["fit", *arguments],
        )
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    made: ClientTrainer = cli.node
    return made


class _NodeParser(TrainingParser):
    """Says what is wrong to the caller, who may have no terminal."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(message) from ex


class _NodeCLI(FedsafeCLI):
    """Makes a `ClientTrainer` where `fit` makes a Trainer, and runs nothing."""

    client: str
    node: ClientTrainer

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Fleet, "fleet")  # the server's, in the same file
        parser.set_defaults({"data.client": self.client})
        parser.link_arguments("run_dir", "data.folder")

    def before_instantiate_classes(self) -> None:
        """Leave out what only the server needs: its files need not be here."""
        config = self.config[self.subcommand]
        config.data.cai = config.federated.cai = None
        config.data.benchmarks = config.data.test_path = None
        config.trainer.callbacks = None
        config.trainer.logger = False
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.base
        if "WORLD_SIZE" not in os.environ and config.trainer.devices == "auto":
            config.trainer.devices = 1  # a Trainer that finds several would start processes
        fit_to_launcher(config.trainer)

    def instantiate_classes(self) -> None:
        """Make the node's parts, and no Trainer: each visit has one of its own."""
        self.config_init = self.parser.instantiate_classes(self.config)
        made = self.config_init[self.subcommand]
        self.node = ClientTrainer(
            made.model,
            made.data,
            made.federated,
            trainer_settings={name: made.trainer[name] for name in _TRAINER}
            | {"default_root_dir": made.run_dir},
        )

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is fitted yet."""
