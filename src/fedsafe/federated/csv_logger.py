"""`metrics.csv` that survives a kill and a resume; Lightning's own logger begins a new file."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch import Tensor


class RoundCSVLogger(CSVLogger):
    """Writes `metrics.csv` of the run directory, a row a round.

    Args:
        run_dir: Run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__(save_dir=run_dir, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> "RoundWriter":
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = RoundWriter(log_dir=self.log_dir)
        assert isinstance(self._experiment, RoundWriter)
        return self._experiment


class RoundWriter(ExperimentWriter):
    """The rows of `metrics.csv`, by round; the file is replaced whole, so that a kill tears none.

    What is logged outside of rounds has no place in it.
    """

    def _check_log_dir_exists(self) -> None:
        """Go on with the file that is there."""
        self.rows: dict[int, dict[str, Any]] = {}
        file = Path(self.metrics_file_path)
        if file.exists():
            with file.open(newline="") as opened:
                self.rows = {int(row["epoch"]): dict(row) for row in csv.DictReader(opened)}

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Add measures to the row of their round, `epoch` (from 0)."""
        if "epoch" not in metrics_dict:
            return
        row = self.rows.setdefault(int(metrics_dict["epoch"]), {})
        row.update({n: v.item() if isinstance(v, Tensor) else v for n, v in metrics_dict.items()})
        row.update(epoch=int(metrics_dict["epoch"]), step=step)

    def keep_rounds(self, num_rounds: int) -> None:
        """Drop the rows of rounds from number `num_rounds` (from 0) on; they will be run again."""
        self.rows = {round_: row for round_, row in self.rows.items() if round_ < num_rounds}

    def complete(self, rounds: Sequence[dict[str, Any]]) -> None:
        """Fill in what a kill between the checkpoint and this file lost, from `rounds.jsonl`."""
        step = -1
        for record in rounds:
            step += sum(client.get("steps", 0) for client in record["clients"])
            measured = {n: v for n, v in record.items() if n.startswith("val/") and v is not None}
            known = {"epoch": record["round"] - 1, "step": step}
            if record["loss"] is not None:  # as it is where it was not finite
                loss = torch.tensor(record["loss"]).item()  # in float32, as Lightning logs it
                known["train/loss"] = loss
            row = self.rows.setdefault(record["round"] - 1, {})
            row.update({n: v for n, v in {**known, **measured}.items() if row.get(n) in (None, "")})

    def save(self) -> None:
        """Write the file beside the old one, then rename it."""
        if not self.rows:
            return
        names = sorted({name for row in self.rows.values() for name in row} - {"epoch", "step"})
        file = Path(self.metrics_file_path)
        scratch = file.with_suffix(".tmp")
        with scratch.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, ["epoch", "step", *names])
            writer.writeheader()
            writer.writerows(self.rows[round_] for round_ in sorted(self.rows))
        scratch.replace(file)
