"""`BenchmarkScores`: means of a benchmark's scores, over all items and by category."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from fedsafe.evaluation.benchmark import Record

NUM_UNSCORED = "num_unscored"


def percent(is_so: bool) -> float:
    """The score of something that is so or not: 100 or 0."""
    return 100.0 if is_so else 0.0


class BenchmarkScores(Metric):
    """Means of the scores of a benchmark's records.

    A mean is over the records that have the score: an item that could not be scored counts for
    nothing, never as 0; `num_unscored` says how many there are. Each of several ranks is given all
    records: nothing is added over ranks.

    Args:
        measures: Names of the scores.
        categories: Categories of the items; None and doubles are left out.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    unscored: Tensor

    def __init__(self, measures: Sequence[str], categories: Iterable[str | None] = ()) -> None:
        super().__init__(sync_on_compute=False)
        self.measures = tuple(measures)
        self.categories = tuple(sorted({name for name in categories if name is not None}))
        shape = (len(self.categories) + 1, len(self.measures))  # the last row: no category
        for name in ("sums", "counts"):
            zeros = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")
        self.add_state("unscored", default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, records: Sequence[Record]) -> None:
        """Add some records."""
        for record in records:
            known = record.category in self.categories
            row = self.categories.index(record.category) if known else len(self.categories)
            for name, score in record.scores.items():
                if score is not None:
                    self.sums[row, self.measures.index(name)] += score
                    self.counts[row, self.measures.index(name)] += 1
            self.unscored += any(score is None for score in record.scores.values())

    def compute(self) -> dict[str, Tensor]:
        """The means by name.

        Returns:
            `<measure>`, over all items; where there are several categories also
            `<category>/<measure>`, and `<measure>_by_category`, the mean of these; `num_unscored`.
            A mean of nothing is left out.
        """
        found: dict[str, Tensor] = {}
        for column, measure in enumerate(self.measures):
            sums, counts = self.sums[:, column], self.counts[:, column]
            if not counts.sum():
                continue
            found[measure] = sums.sum() / counts.sum()
            means = {
                f"{name}/{measure}": sums[row] / counts[row]
                for row, name in enumerate(self.categories)
                if counts[row]
            }
            if len(means) > 1:
                found |= means
                found[f"{measure}_by_category"] = torch.stack([*means.values()]).mean()
        return {**found, NUM_UNSCORED: self.unscored}
