"""`RecordWriter`: what benchmarks asked and were replied, into the run directory."""

from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from fedsafe.evaluation.benchmark import Record
from fedsafe.evaluation.loading import BenchmarkBatch
from fedsafe.evaluation.result_files import note_test, put_results, write_records
from fedsafe.model.module import LoraLM


class RecordWriter(Callback):
    """Writes the records and the measures of each benchmark as soon as all of it has been asked.

    Of several ranks the first one writes; all have all records.

    Args:
        about: By benchmark, what is to be written down of its test beside time and adapter.
    """

    def __init__(self, about: Mapping[str, Mapping[str, Any]]) -> None:
        self.about = about
        self.records: dict[str, list[Record]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        self.records.clear()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the records of a batch; after the last one, write them."""
        if not isinstance(batch, BenchmarkBatch):
            return
        name = batch.benchmark.name
        self.records.setdefault(name, []).extend(outputs["records"])
        if batch_idx + 1 == trainer.num_test_batches[dataloader_idx]:
            assert isinstance(pl_module, LoraLM)
            batch.benchmark.release()
            digest = _digest(pl_module) if pl_module.subject == "test" else None  # all ranks read
            if trainer.is_global_zero:
                self._write(Path(trainer.default_root_dir), pl_module, name, digest)

    def _write(self, run_dir: Path, module: LoraLM, name: str, digest: str | None) -> None:
        subject = module.subject
        scores = module.benchmark_scores[name].compute()
        write_records(run_dir, subject, name, self.records.pop(name))
        put_results(run_dir, subject, name, {each: x.item() for each, x in scores.items()})
        about = {
            **self.about.get(name, {}),
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "digest": digest,
        }
        note_test(run_dir, subject, name, about)


def _digest(module: LoraLM) -> str:
    """Of the adapter's values."""
    values = module.flat_adapter().read().cpu().numpy()
    return blake2b(values.tobytes(), digest_size=8).hexdigest()
