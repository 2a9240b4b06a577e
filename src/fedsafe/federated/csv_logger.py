"""`metrics.csv` that survives a resume; Lightning's own logger begins a new file."""

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class RoundCSVLogger(CSVLogger):
    """Writes `metrics.csv` of the run directory, a row a round.

    Args:
        run_dir: Run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__(save_dir=run_dir, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _KeepingWriter(log_dir=self.log_dir)
        assert isinstance(self._experiment, _KeepingWriter)
        return self._experiment

    def keep_rounds(self, num_rounds: int) -> None:
        """Drop the rows of rounds from number `num_rounds` (from 0) on; they will be run again."""
        file = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        if not file.exists():
            return
        with file.open(newline="") as opened:
            reader = csv.DictReader(opened)
            rows = [row for row in reader if int(row["epoch"]) < num_rounds]
            names = list(reader.fieldnames or [])
        scratch = file.with_suffix(".tmp")
        with scratch.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, names)
            writer.writeheader()
            writer.writerows(rows)
        scratch.replace(file)


class _KeepingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Go on with the file that is there."""
        file = Path(self.metrics_file_path)
        if file.exists():
            with file.open(newline="") as opened:
                self.metrics_keys = list(csv.DictReader(opened).fieldnames or [])
