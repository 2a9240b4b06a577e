"""`SafetyProbe`: a small sample of benchmarks, asked round by round."""

import json
from collections.abc import Sequence
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.data.output_files import write_whole
from fedsafe.evaluation.benchmark import Benchmark, Record, check_counts, evenly_spread
from fedsafe.evaluation.loading import BenchmarkBatch, batches_of, check_names
from fedsafe.evaluation.scores import NUM_UNSCORED, BenchmarkScores
from fedsafe.model.module import LoraLM
from fedsafe.strategies.layout import layout_of

BEFORE = "before.json"
"""What was measured before the first round; beside `rounds.jsonl`."""


class SafetyProbe(Callback):
    """Asks a sample of each benchmark before the first round and after rounds.

    Logs `val/<benchmark>/<measure>`, which early stopping can watch:

        - class_path: lightning.pytorch.callbacks.EarlyStopping
          init_args: {monitor: val/advbench/refusal_rate, mode: max, patience: 3, strict: false}

    It must not be strict where a round is not probed: there is nothing to watch then.

    A look at the run, not the benchmark itself. It comes with validation, and asks the adapter
    validated last: in mode `local`, one client's.

    Args:
        benchmarks: What to ask.
        num_items: Items asked of each, spread evenly over it.
        every_n_rounds: Rounds between two looks.
    """

    def __init__(
        self, benchmarks: list[Benchmark], num_items: int = 48, every_n_rounds: int = 1
    ) -> None:
        if not benchmarks:
            raise ValueError("the safety probe has no benchmarks; give one or more")
        check_counts("the safety probe", num_items=num_items, every_n_rounds=every_n_rounds)
        check_names(benchmarks)
        self.benchmarks = benchmarks
        self.num_items = num_items
        self.every_n_rounds = every_n_rounds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the items."""
        for benchmark in self.benchmarks if stage != "test" else ():
            benchmark.load()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run that has no validation."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, FederatedDataModule)
        if not data.val_dataloader():
            raise ValueError(
                "the safety probe asks when a round is validated, and no sample is held out; set "
                "data.validation_share above 0, or leave the probe out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask before the first round."""
        if trainer.global_step == 0 and trainer.current_epoch == 0:
            text = json.dumps(self._measure(pl_module), indent=1) + "\n"
            if trainer.is_global_zero:
                write_whole(Path(trainer.default_root_dir) / BEFORE, [text])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask, and log the measures."""
        for name in self._names():
            trainer.callback_metrics.pop(name, None)  # an earlier round's
        if trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_rounds:
            return
        pl_module.log_dict(self._measure(pl_module), prog_bar=True)

    def _measure(self, pl_module: LightningModule) -> dict[str, float]:
        """Every measure of the samples by its name."""
        assert isinstance(pl_module, LoraLM)
        found: dict[str, float] = {}
        with pl_module.trainer.precision_plugin.forward_context():  # as it is trained
            records = self._ask(pl_module)
        for benchmark in self.benchmarks:
            benchmark.release()
            scores = BenchmarkScores(benchmark.measures)
            scores.update(records[benchmark.name])
            means = scores.compute().items()
            found |= {_name(benchmark, n): x.item() for n, x in means if n != NUM_UNSCORED}
        return found

    def _ask(self, module: LoraLM) -> dict[str, list[Record]]:
        """The records of each benchmark's sample, on every rank; replicas share the asking."""
        replicas = layout_of(module.trainer.strategy).replicas
        respondent = module.respondent()
        records: dict[str, list[Record]] = {benchmark.name: [] for benchmark in self.benchmarks}
        units = [
            BenchmarkBatch(benchmark, places)
            for benchmark in self.benchmarks
            for places in self._parts(benchmark, alone=replicas.size == 1)
        ]

        def ask(unit: BenchmarkBatch) -> list[Record]:
            for other in self.benchmarks:  # one guard or judge in memory at a time
                if other is not unit.benchmark:
                    other.release()
            return unit.benchmark.ask(respondent, unit.places)

        for unit, found in zip(units, replicas.in_turns(units, ask), strict=True):
            records[unit.benchmark.name] += found
        return records

    def _parts(self, benchmark: Benchmark, *, alone: bool) -> list[Sequence[int]]:
        """The sample, in the batches that it is asked in; alone a benchmark makes them itself."""
        places = evenly_spread(range(benchmark.num_items), self.num_items)
        return [places] if alone else batches_of(places, benchmark.batch_size)

    def _names(self) -> list[str]:
        return [_name(one, measure) for one in self.benchmarks for measure in one.measures]


def _name(benchmark: Benchmark, measure: str) -> str:
    return f"val/{benchmark.name}/{measure}"
