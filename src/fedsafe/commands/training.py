"""`fedsafe fit`, `validate` and `test`: LightningCLI with a run directory and rounds."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse.typing import NonNegativeInt
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console

from fedsafe.commands import class_names  # noqa: F401
from fedsafe.commands.launcher import fit_to_launcher, is_first_rank
from fedsafe.commands.noise import quiet_known_noise
from fedsafe.commands.parsing import exit_with
from fedsafe.commands.tested_adapter import HELP as ADAPTER_HELP
from fedsafe.commands.tested_adapter import NONE as NO_ADAPTER
from fedsafe.commands.tested_adapter import check_base, with_settings
from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.evaluation.record_writer import RecordWriter
from fedsafe.evaluation.result_files import add_results, read_results, set_aside
from fedsafe.federated.checkpoint import AtomicCheckpointIO, RoundCheckpoint, last_checkpoint
from fedsafe.federated.csv_logger import RoundCSVLogger
from fedsafe.federated.progress import RoundProgressBar
from fedsafe.federated.round_log import RoundLog
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.run_facts import write_run_facts
from fedsafe.model.module import LoraLM
from fedsafe.model.pretrained import base_of
from fedsafe.page.write import page_line, write_run_report
from fedsafe.report import RunReport
from fedsafe.results_report import print_results

RUN_FILES = ("rounds.jsonl", "checkpoints", "adapter", "adapters")
"""What training leaves in a run directory; any of it says that a run has been here."""

DESCRIPTIONS = {
    "fit": "Train an adapter on the clients' conversations, round by round.",
    "validate": "Measure a run's checkpoint on the conversations held out from its clients.",
    "test": (
        "Measure a run's checkpoint, or any adapter, on benchmarks (data.benchmarks) and on test "
        "conversations (data.test_path)."
    ),
}
_CKPT_PATH_HELP = (
    "Checkpoint to go on from, or to measure: a file, or `last` for the newest one of run_dir. "
    "`validate` and `test` take the last one unless told otherwise."
)
_SEED_HELP = (
    "Seed of everything random: the partition, the sampled clients, the order of batches, the "
    "adapter's initial values."
)


class AcceptedConfig(SaveConfigCallback):
    """Writes the run's configuration once training begins: a refused resume leaves the old one."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait: a checkpoint to go on from may be refused yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it; what was measured of an adapter before is no longer this run's."""
        super().setup(trainer, pl_module, stage="fit")
        if trainer.is_global_zero:
            set_aside(Path(trainer.default_root_dir))


class TrainingParser(LightningArgumentParser):
    """Parser of the Trainer's commands."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See `exit_with`."""
        exit_with(self, message, ex)


def run(name: str, arguments: list[str]) -> None:
    """Run one of the Trainer's commands."""
    with plain_errors():
        make_cli([name, *arguments])


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn Lightning's own errors, and its way to end at Ctrl-C, into ordinary ones."""
    quiet_known_noise()
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # the Trainer exits with status 1
            raise KeyboardInterrupt from None
        raise


def make_cli(
    arguments: list[str],
    *,
    kind: "type[FedsafeCLI] | None" = None,
    data: type[FederatedDataModule] = FederatedDataModule,
    **own: Any,
) -> "FedsafeCLI":
    """Parse the arguments, whose first is the command, and run it.

    Args:
        arguments: The command's name and its arguments.
        kind: What runs it.
        data: The data module.
        own: Further attributes of the kind.
    """
    name, base = arguments[0], kind or FedsafeCLI
    alone = {name: base.subcommands()[name]}  # a parser takes a quarter of a second to build
    own = {"subcommands": staticmethod(lambda: alone), "given": ["fedsafe", *arguments], **own}
    made: FedsafeCLI = type(base.__name__, (base,), own)(
        LoraLM,
        data,
        save_config_callback=AcceptedConfig if name == "fit" else None,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={
            "reload_dataloaders_every_n_epochs": 1,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "inference_mode": False,  # what it makes cannot be trained on: parts of a split base
            "enable_model_summary": False,
        },
        parser_kwargs={"prog": "fedsafe", name: {"description": DESCRIPTIONS[name]}},
        parser_class=TrainingParser,
        auto_configure_optimizers=False,
        args=with_settings(arguments),
    )
    return made


class FedsafeCLI(LightningCLI):
    """Adds the rounds, the run directory and its files to Lightning's command line."""

    given: list[str]
    """The command as it was given."""
    rounds: type[FederatedRounds] = FederatedRounds

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that are commands, with the arguments that no user gives."""
        objects = {"model", "datamodule", "weights_only"}
        return {
            "fit": objects | {"train_dataloaders", "val_dataloaders"},
            "validate": objects | {"dataloaders"},
            "test": objects | {"dataloaders"},
        }

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed: a number, where Lightning would also take true, false and None."""
        parser.add_argument(
            "--seed_everything",
            type=NonNegativeInt,
            default=self.seed_everything_default,
            help=_SEED_HELP,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run's own settings, and those that several parts must share."""
        parser.add_argument("--rounds", type=int, default=10, help="Number of federated rounds.")
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/last",
            help="Directory that gets everything the run writes; it must not hold another run.",
        )
        for part, kind in {"federated": self.rounds, "checkpoint": RoundCheckpoint}.items():
            parser.add_class_arguments(kind, part, fail_untyped=False, sub_configs=True)
        parser.link_arguments("rounds", "trainer.max_epochs")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        for part in ("model", "data", "federated"):
            parser.link_arguments("seed_everything", f"{part}.seed", compute_fn=int)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Explain in our words what Lightning explains for its own use."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = _CKPT_PATH_HELP
        if subcommand == "test":
            parser.add_argument("--adapter", type=str | None, default=None, help=ADAPTER_HELP)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Do not let a checkpoint's settings replace given ones: the run refuses other ones."""

    def before_instantiate_classes(self) -> None:
        """Refuse to mix two runs; find the checkpoint to go on from."""
        config = self.config[self.subcommand]
        run_dir = Path(config.run_dir)
        # kept out of the configuration, whose copy in the run directory may start other runs
        self._checkpoint, config.ckpt_path = config.ckpt_path, None
        measuring = self.subcommand != "fit"
        self._adapter: str | None = config.pop("adapter", None)
        fit_to_launcher(config.trainer)
        if self._adapter is not None:
            self._take_adapter(config)
            return
        if measuring and config.federated.mode == "local":
            raise ValueError(
                f"mode `local` has no global adapter to {self.subcommand}; each client's losses "
                f"are in {run_dir}/rounds.jsonl"
            )
        if self._checkpoint == "last" or (measuring and self._checkpoint is None):
            find = _measured_checkpoint if measuring else _last_checkpoint
            self._checkpoint = find(run_dir)
        elif self._checkpoint is not None and not Path(self._checkpoint).is_file():
            raise ValueError(f"there is no checkpoint {self._checkpoint}; give a file or `last`")
        elif self._checkpoint is None:
            _refuse_occupied(run_dir)
        _point_to_world(config)

    def _take_adapter(self, config: Any) -> None:
        """Test this adapter: no checkpoint, and no base but its own."""
        assert self._adapter is not None
        if self._checkpoint is not None:
            raise ValueError(
                f"both --adapter {self._adapter} and --ckpt_path {self._checkpoint} are given; "
                "give one of them"
            )
        if self._adapter == NO_ADAPTER:
            return
        folder = Path(self._adapter)
        if config.model.from_config is not None:  # the adapter's base is that, as it was written
            config.model.from_config = None
            config.model.base = base_of(folder)
        if (folder / "tokenizer_config.json").exists():  # the one that it was trained with
            config.data.train_tokenizer = None
            config.data.tokenizer = str(folder)
        check_base(folder, config.model.base)

    def instantiate_classes(self) -> None:
        """Tell the model what is tested."""
        super().instantiate_classes()
        if self._adapter == NO_ADAPTER:
            self.model.subject = "base"
        elif self._adapter is not None:
            self.model.adapter_folder = Path(self._adapter)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has: its rounds, loggers, progress bar, report and checkpoints."""
        config = self.config_init[self.subcommand]
        callbacks = [config.federated, *_as_list(config.trainer.callbacks)]
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(RoundProgressBar())
        callbacks += [RunReport(), RecordWriter(self._about_tests()), config.checkpoint]
        kwargs["logger"] = self.subcommand == "fit" and _loggers(config)
        if not config.trainer.plugins:
            kwargs["plugins"] = [AtomicCheckpointIO()]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _about_tests(self) -> dict[str, dict[str, Any]]:
        """By benchmark, how it is about to be measured."""
        settings = self.config[self.subcommand].clone().as_dict()["data"]["benchmarks"] or []
        about = {
            "command": self.given,
            "adapter": None if self._adapter == NO_ADAPTER else self._adapter or self._checkpoint,
        }
        return {
            benchmark.name: {**about, "settings": each}
            for benchmark, each in zip(self.datamodule.benchmarks, settings, strict=True)
        }

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        given = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "test":
            given["verbose"] = False  # its table is made for few measures
        return {**given, "ckpt_path": self._checkpoint}

    def before_fit(self) -> None:
        """Write down how the run was started; what goes on was started before."""
        if self._checkpoint is None and is_first_rank():
            run_dir = Path(self.config[self.subcommand].run_dir)
            write_run_facts(run_dir, self.given)

    def after_validate(self) -> None:
        """Write down what was measured."""
        self._write_results()

    def after_test(self) -> None:
        """Write down what was measured, and show it."""
        self._write_results()
        if not self.trainer.is_global_zero:
            return
        run_dir = Path(self.config[self.subcommand].run_dir)
        measured = self.trainer.callback_metrics.keys()
        results = read_results(run_dir)
        print_results({name: results[name] for name in measured}, run_dir)
        Console().print(page_line(write_run_report, run_dir), soft_wrap=True)

    def _write_results(self) -> None:
        """Add the measures to `results.json`, but for those that benchmarks put there."""
        if not self.trainer.is_global_zero:
            return
        metrics = self.trainer.callback_metrics.items()
        tested = tuple(f"{self.model.subject}/{name}/" for name in self.model.benchmark_scores)
        measured = {name: x.item() for name, x in metrics if not name.startswith(tested)}
        add_results(Path(self.config[self.subcommand].run_dir), measured)


def _loggers(config: Any) -> list[Logger] | bool:
    """`metrics.csv` of the run directory, and the user's loggers or else TensorBoard."""
    given = config.trainer.logger
    if given is False:
        return False
    default = given in (None, True)
    others = [TensorBoardLogger(config.run_dir, name="tensorboard", version="")]
    return [RoundCSVLogger(config.run_dir), *(others if default else _as_list(given))]


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _refuse_occupied(run_dir: Path) -> None:
    found = [name for name in RUN_FILES if (run_dir / name).exists()]
    if found:
        raise ValueError(
            f"run_dir {run_dir} holds another run ({', '.join(found)}); resume it with "
            "--ckpt_path last, or give another --run_dir"
        )


def _measured_checkpoint(run_dir: Path) -> str:
    file = last_checkpoint(run_dir)
    if not file.exists():
        raise ValueError(
            f"there is no checkpoint to measure in {run_dir}; train it first with fedsafe fit, or "
            "give another --run_dir or --ckpt_path"
        )
    return str(file)


def _last_checkpoint(run_dir: Path) -> str | None:
    """The run's newest checkpoint; None, which is from the start, if there is none yet.

    A run killed in its first round has no checkpoint. What that round left is removed.
    """
    file = last_checkpoint(run_dir)
    if file.exists():
        return str(file)
    if not run_dir.exists():
        raise ValueError(f"there is no run to resume in {run_dir}; leave --ckpt_path out")
    finished = len(RoundLog(run_dir / "rounds.jsonl").read())
    if finished > 1:
        raise ValueError(
            f"{run_dir} has {finished} finished rounds but no {file.relative_to(run_dir)}; "
            "give another --run_dir to start anew"
        )
    if not is_first_rank():
        return None
    for name in ("adapter", "adapters"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    (run_dir / "rounds.jsonl").unlink(missing_ok=True)
    sys.stderr.write(f"{run_dir} has no checkpoint yet; the run begins again\n")
    return None


def _point_to_world(config: Any) -> None:
    """Say how to make the miniature's files where a configuration uses them and they are missing.

    They are told by their names: base/ and clients.jsonl or guard.jsonl in one folder.
    """
    base, path = Path(config.model.base), config.data.path
    known = [str(base.parent / name) for name in ("clients.jsonl", "guard.jsonl")]
    if base.name == "base" and path in known and not Path(path).exists():
        raise ValueError(
            f"{path} is missing; write the miniature first: fedsafe world --output {base.parent}"
        )
