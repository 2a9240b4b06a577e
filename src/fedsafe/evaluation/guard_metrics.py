"""How well a guard tells unsafe conversations from safe ones, where labels say which is which."""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_average_precision
from torchmetrics.utilities import dim_zero_cat


class GuardScores(NamedTuple):
    """Figures of one guard on labelled conversations; `unsafe` is the positive class.

    A figure that is not defined is None, never 0 or 1: recall, F1 and AUPRC where nothing is
    unsafe, precision where nothing was flagged, the false-positive rate where nothing is safe.
    """

    samples: int
    unsafe: int
    """Samples whose label is unsafe."""
    flagged: int
    """Samples that the guard calls unsafe."""
    accuracy: float | None
    precision: float | None
    """Share of the flagged that are unsafe."""
    recall: float | None
    """Share of the unsafe that are flagged."""
    f1: float | None
    """Harmonic mean of precision and recall; 0 where nothing unsafe is flagged."""
    auprc: float | None
    """Area under the precision-recall curve as average precision; of no threshold."""
    false_positive_rate: float | None
    """Share of the safe that are flagged."""


class GuardMetrics(Metric):
    """`GuardScores` of a stream of verdicts.

    A sample is flagged where its probability is at least the threshold, as the filter flags it;
    torchmetrics' own classes would ask for more than the threshold. Keeps the probabilities, 9
    bytes a sample, because the area under the curve is exact. Each of several ranks is given all
    verdicts: nothing is added over ranks.

    Args:
        threshold: Probability from which a sample counts as unsafe.
    """

    full_state_update = False

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__(sync_on_compute=False)
        self.threshold = threshold
        self.probabilities: list[Tensor]
        self.labels: list[Tensor]
        self.add_state("probabilities", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add verdicts.

        Args:
            probabilities: Of being unsafe, shape ``(batch,)``, 0 to 1; any float type.
            labels: True or 1 where unsafe, shape ``(batch,)``.

        Raises:
            ValueError: If the shapes differ, or a probability is none.
        """
        if probabilities.shape != labels.shape or probabilities.ndim != 1:
            raise ValueError(
                f"probabilities {tuple(probabilities.shape)} and labels {tuple(labels.shape)} "
                "must be one row of the same length"
            )
        wrong = probabilities[~((probabilities >= 0) & (probabilities <= 1))]
        if len(wrong):
            raise ValueError(f"{wrong[0].item()} is no probability; give values from 0 to 1")
        self.probabilities.append(probabilities.double())
        self.labels.append(labels.bool())

    def compute(self) -> GuardScores:
        """The figures of all verdicts so far."""
        if not self.probabilities:
            return GuardScores(0, 0, 0, *[None] * 6)
        return _scores(dim_zero_cat(self.probabilities), dim_zero_cat(self.labels), self.threshold)


def guard_scores(
    probabilities: NDArray[np.float64], labels: NDArray[np.bool_], *, threshold: float
) -> GuardScores:
    """The figures of verdicts that are all there.

    Args:
        probabilities: Of being unsafe, shape ``(samples,)``.
        labels: True where unsafe, shape ``(samples,)``.
        threshold: Probability from which a sample counts as unsafe.
    """
    metrics = GuardMetrics(threshold)
    metrics.update(torch.from_numpy(probabilities), torch.from_numpy(labels))
    return metrics.compute()


def _scores(probabilities: Tensor, labels: Tensor, threshold: float) -> GuardScores:
    flagged = probabilities >= threshold
    hits = int((flagged & labels).sum())
    num, num_unsafe, num_flagged = len(labels), int(labels.sum()), int(flagged.sum())
    area = binary_average_precision(probabilities, labels.int()) if num_unsafe else None
    return GuardScores(
        samples=num,
        unsafe=num_unsafe,
        flagged=num_flagged,
        accuracy=_share(int((flagged == labels).sum()), num),
        precision=_share(hits, num_flagged),
        recall=_share(hits, num_unsafe),
        f1=2 * hits / (num_unsafe + num_flagged) if num_unsafe else None,
        auprc=None if area is None else float(area),
        false_positive_rate=_share(num_flagged - hits, num - num_unsafe),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def scores_by(
    groups: Iterable[str | None],
    probabilities: NDArray[np.float64],
    labels: NDArray[np.bool_],
    *,
    threshold: float,
) -> dict[str, GuardScores]:
    """The figures of each group of samples, such as each category or client, by name.

    Args:
        groups: Name of each sample's group; samples of None are in none.
        probabilities: Of being unsafe, shape ``(samples,)``.
        labels: True where unsafe, shape ``(samples,)``.
        threshold: Probability from which a sample counts as unsafe.
    """
    places: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        if group is not None:
            places.setdefault(group, []).append(place)
    return {
        name: guard_scores(probabilities[where], labels[where], threshold=threshold)
        for name, where in sorted(places.items())
    }


def threshold_for_recall(
    probabilities: Sequence[float] | NDArray[np.float64],
    labels: Sequence[bool] | NDArray[np.bool_],
    wanted_recall: float,
) -> float:
    """The highest threshold at which a guard flags at least a share of the unsafe samples.

    Choose it on some samples and measure it on others: on those it was chosen with it looks better
    than it is.

    Args:
        probabilities: Of being unsafe.
        labels: True where unsafe.
        wanted_recall: Share of the unsafe that must be flagged, above 0 to 1.

    Raises:
        ValueError: If no sample is unsafe, or the recall is not in the range.
    """
    if not 0 < wanted_recall <= 1:
        raise ValueError(f"wanted_recall is {wanted_recall}; give a share above 0, at most 1")
    unsafe = np.sort(np.asarray(probabilities, dtype=float)[np.asarray(labels, dtype=bool)])[::-1]
    if len(unsafe) == 0:
        raise ValueError(
            f"none of {len(labels)} samples is labelled unsafe, so no threshold has a recall; "
            "give samples of both labels"
        )
    needed = ceil(wanted_recall * len(unsafe))
    # the product may have been rounded up past a whole number: 0.7 * 10 is 7.000000000000001
    needed -= (needed - 1) / len(unsafe) >= wanted_recall
    return float(unsafe[needed - 1])


def validation_part(keys: Iterable[bytes], *, share: float, seed: int) -> NDArray[np.bool_]:
    """Which samples a threshold is chosen with; the others are to measure it.

    A pure function of each key and the seed: equal conversations fall on the same side, and the
    order of the samples does not matter.

    Args:
        keys: A hash of each sample's content.
        share: Of the samples that are chosen, on average, 0 to 1.
        seed: Another seed, another choice.
    """
    limit = share * 2**64
    salt = seed.to_bytes(8)
    digests = (blake2b(salt + key, digest_size=8).digest() for key in keys)
    return np.array([int.from_bytes(digest) < limit for digest in digests], dtype=bool)
