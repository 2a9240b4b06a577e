"""`fedsafe fit`, `validate` and `test`: LightningCLI with a run directory and rounds."""

import sys
import warnings
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.federated.checkpoint import LAST, AtomicCheckpointIO, RoundCheckpoint
from fedsafe.federated.csv_logger import RoundCSVLogger
from fedsafe.federated.progress import RoundProgressBar
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.model.module import LoraLM
from fedsafe.report import RunReport

# Kept in the run directory; any of them says that a run has been here.
RUN_FILES = ("config.yaml", "rounds.jsonl", "checkpoints", "adapter", "adapters")


def run(name: str, arguments: list[str]) -> None:
    """Run one of the Trainer's commands."""
    _quiet_known_noise()
    FedsafeCLI(
        LoraLM,
        FederatedDataModule,
        seed_everything_default=0,
        trainer_defaults={
            "reload_dataloaders_every_n_epochs": 1,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        args=[name, *arguments],
    )


class FedsafeCLI(LightningCLI):
    """Adds the rounds, the run directory and its files to Lightning's command line."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that are commands, with the arguments that no user gives."""
        objects = {"model", "datamodule", "weights_only"}
        return {
            "fit": objects | {"train_dataloaders", "val_dataloaders"},
            "validate": objects | {"dataloaders"},
            "test": objects | {"dataloaders"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run's own settings, and those that several parts must share."""
        parser.add_argument("--rounds", type=int, default=10, help="Number of federated rounds.")
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/last",
            help="Directory that gets everything the run writes; it must not hold another run.",
        )
        parser.add_lightning_class_args(FederatedRounds, "federated")
        parser.add_lightning_class_args(RoundCheckpoint, "checkpoint")
        parser.link_arguments("rounds", "trainer.max_epochs")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        for part in ("model", "data", "federated"):
            parser.link_arguments("seed_everything", f"{part}.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        """Refuse to mix two runs; find the checkpoint to go on from."""
        config = self.config[self.subcommand]
        run_dir = Path(config.run_dir)
        if config.ckpt_path == "last":
            config.ckpt_path = _last_checkpoint(run_dir)
        elif self.subcommand == "fit" and config.ckpt_path is None:
            _refuse_occupied(run_dir)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has: its loggers, its progress bar and its report."""
        config = self.config_init[self.subcommand]
        if config.trainer.logger in (None, True):
            run_dir = config.run_dir
            kwargs["logger"] = [
                RoundCSVLogger(run_dir),
                TensorBoardLogger(run_dir, name="tensorboard", version=""),
            ]
        if not config.trainer.plugins:
            kwargs["plugins"] = [AtomicCheckpointIO()]
        callbacks = list(config.trainer.callbacks or [])
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(RoundProgressBar())
        if self.subcommand == "fit":
            callbacks.append(RunReport())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)


def _refuse_occupied(run_dir: Path) -> None:
    found = [name for name in RUN_FILES if (run_dir / name).exists()]
    if found:
        raise ValueError(
            f"run_dir {run_dir} holds another run ({', '.join(found)}); resume it with "
            "--ckpt_path last, or give another --run_dir"
        )


def _last_checkpoint(run_dir: Path) -> str | None:
    """The run's newest checkpoint; None, which is from the start, if there is none yet."""
    file = run_dir / "checkpoints" / LAST
    if file.exists():
        return str(file)
    if not run_dir.exists():
        raise ValueError(f"there is no run to resume in {run_dir}; leave --ckpt_path out")
    sys.stderr.write(f"{run_dir} has no checkpoint yet; the run begins again\n")
    return None


def _quiet_known_noise() -> None:
    """Advice of Lightning that is wrong here, where loaders are cheap and rounds are the epochs."""
    for message in (
        ".*LightningCLI's args parameter.*",
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*ended before the epoch ended and your dataloader is not resumable.*",
        ".*found .* module.* in eval mode.*",
    ):
        warnings.filterwarnings("ignore", message)
