"""`rounds.jsonl`: one line a round, appended as rounds end, cut back when a run resumes."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsafe.data.output_files import write_whole

_CAI_TOTALS = (
    "asked",
    "kept",
    "pairs",
    "sft_steps",
    "dpo_steps",
    "tokens_generated",
    "tokens_read",
    "tokens_trained",
    "seconds",
    "seconds_revising",
    "seconds_training",
)


class RoundLog:
    """The record of finished rounds.

    Args:
        file: Path of `rounds.jsonl`; made when the first round ends.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def keep(self, num_rounds: int) -> None:
        """Keep the first `num_rounds` rounds: a resumed run writes the later ones again."""
        rows = self.read()[:num_rounds]
        if len(rows) < num_rounds:
            raise ValueError(
                f"{self.file} has {len(rows)} rounds, but the checkpoint was written after "
                f"{num_rounds}; resume in the run directory that the checkpoint belongs to"
            )
        if self.file.exists():
            write_whole(self.file, map(_line, rows))

    def refuse_any(self) -> None:
        """Refuse to begin a run where one has been.

        Raises:
            ValueError: If there are finished rounds.
        """
        if self.read():
            raise ValueError(
                f"{self.file.parent} holds another run; resume it with ckpt_path, or give the "
                "Trainer another default_root_dir"
            )

    def append(self, row: dict[str, Any]) -> None:
        """Write one round and make sure that it is on disk."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole rounds; a last line that a kill cut short is left out."""
        if not self.file.exists():
            return []
        rows = []
        for line in self.file.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows


def cai_costs(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What constitutional training did and cost in all rounds of a run, in numbers."""
    visits = [row[name] for row in rounds for name in ("cai", "cai_before") if name in row]
    totals = {name: sum(visit.get(name, 0) for visit in visits) for name in _CAI_TOTALS}
    trained = sum(visit.get("sft_steps", 0) + visit.get("dpo_steps", 0) > 0 for visit in visits)
    return {"visits": trained, **totals}


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
