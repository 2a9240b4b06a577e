"""A guard on labelled samples: its figures, over all and by category and client."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray

from fedsafe.evaluation.guard_metrics import (
    GuardScores,
    guard_scores,
    scores_by,
    threshold_for_recall,
    validation_part,
)
from fedsafe.peers import ALONE, Peers
from fedsafe.safety.guard import Guard, shown
from fedsafe.safety.score_cache import ScoreCache, conversation_key
from fedsafe.types import Conversation, JudgedPart


class WantedRecall(NamedTuple):
    """A share of the unsafe that must be flagged, and where the threshold for it is chosen."""

    recall: float
    validation_share: float = 0.5
    """Share of the samples that it is chosen on; the others measure it."""
    seed: int = 0


class Choice(NamedTuple):
    """A threshold that was chosen for a wanted recall."""

    wanted_recall: float
    samples: int
    """Samples that it was chosen on; the guard's scores are of the others."""
    recall: float
    """Its recall on these."""
    given_threshold: float
    given: GuardScores
    """Scores of the other samples at the threshold that was given."""


@dataclass(frozen=True)
class GuardResult:
    """What a guard said of labelled samples and how right it was.

    Attributes:
        name: Of the guard, in the table.
        identity: The guard's.
        threshold: Probability from which it calls a sample unsafe, given or chosen.
        probabilities: Of being unsafe, of the samples that are measured.
        labels: True where unsafe, of the same.
        overall: The scores of all of them.
        by_category: Of each category; samples without one are in none.
        by_client: Of each client; samples without one are in none.
        shortened: Samples of which it saw the beginning and end only.
        choice: How the threshold was chosen; None where it was given.
    """

    name: str
    identity: str
    threshold: float
    probabilities: NDArray[np.float64]
    labels: NDArray[np.bool_]
    overall: GuardScores
    by_category: dict[str, GuardScores]
    by_client: dict[str, GuardScores]
    shortened: int
    choice: Choice | None

    def as_json(self) -> dict[str, Any]:
        """What `guards.json` holds of it."""
        choice = self.choice and {**self.choice._asdict(), "given": self.choice.given._asdict()}
        return {
            "name": self.name,
            "identity": self.identity,
            "threshold": self.threshold,
            "overall": self.overall._asdict(),
            "by_category": {name: each._asdict() for name, each in self.by_category.items()},
            "by_client": {name: each._asdict() for name, each in self.by_client.items()},
            "shortened": self.shortened,
            "choice": choice,
        }


def labelled_only(samples: datasets.Dataset) -> datasets.Dataset:
    """The samples that have a label.

    Raises:
        ValueError: If none has.
    """
    labels = samples["label"]
    places = [place for place, label in enumerate(labels) if label is not None]
    if not places:
        raise ValueError(
            f"none of {len(samples)} samples has a label, so nothing says what is unsafe; give "
            "each a field `label` that is safe or unsafe"
        )
    return samples.select(places)


def measure_guard(
    guard: Guard,
    samples: datasets.Dataset,
    *,
    judge: JudgedPart = "pair",
    name: str | None = None,
    threshold: float = 0.5,
    wanted: WantedRecall | None = None,
    peers: Peers = ALONE,
) -> GuardResult:
    """Judge labelled samples, through the cache of verdicts, and score the guard.

    Args:
        guard: Who judges.
        samples: As `data.sources.load_samples` returns them, all labelled.
        judge: What the guard is shown of a sample.
        name: Of the guard, in the table; None takes its own.
        threshold: Probability from which it calls a sample unsafe.
        wanted: Recall for which another threshold is chosen on a part of the samples; only the
            others are scored then.
        peers: Ranks that share the judging; all are given the same samples.

    Raises:
        ValueError: If there is no unsafe sample to choose the threshold on, or none is left to
            measure it.
    """
    messages = samples["messages"]
    verdicts = ScoreCache(guard).verdicts([shown(m, judge) for m in messages], peers=peers)
    unsafe = np.array([verdict.unsafe for verdict in verdicts])
    labels: NDArray[np.bool_] = np.array(samples["label"]) == "unsafe"
    measured = np.ones(len(labels), dtype=np.bool_)
    given, choice = threshold, None
    if wanted is not None:
        chosen_on = _chosen_on(messages, wanted)
        measured = _others(chosen_on, wanted)
        threshold = threshold_for_recall(unsafe[chosen_on], labels[chosen_on], wanted.recall)
        choice = Choice(
            wanted_recall=wanted.recall,
            samples=int(chosen_on.sum()),
            recall=float((unsafe[chosen_on & labels] >= threshold).mean()),
            given_threshold=given,
            given=guard_scores(unsafe[measured], labels[measured], threshold=given),
        )
    unsafe, labels = unsafe[measured], labels[measured]
    groups = {}
    for column in ("category", "client"):
        names = np.array(samples[column], dtype=object)[measured]
        groups[column] = scores_by(names.tolist(), unsafe, labels, threshold=threshold)
    return GuardResult(
        name=name or guard.name,
        identity=guard.identity,
        threshold=threshold,
        probabilities=unsafe,
        labels=labels,
        overall=guard_scores(unsafe, labels, threshold=threshold),
        by_category=groups["category"],
        by_client=groups["client"],
        shortened=sum(v.shortened for v, is_in in zip(verdicts, measured, strict=True) if is_in),
        choice=choice,
    )


def _chosen_on(messages: Sequence[Conversation], wanted: WantedRecall) -> NDArray[np.bool_]:
    keys = [conversation_key(each) for each in messages]
    return validation_part(keys, share=wanted.validation_share, seed=wanted.seed)


def _others(chosen_on: NDArray[np.bool_], wanted: WantedRecall) -> NDArray[np.bool_]:
    if chosen_on.all() or not chosen_on.any():
        raise ValueError(
            f"{len(chosen_on)} samples are too few to set a share of {wanted.validation_share:g} "
            "of them apart for the threshold; give more samples or another validation_share"
        )
    return ~chosen_on
