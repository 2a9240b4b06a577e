import numpy as np
import pytest
import torch

from fedsafe.evaluation.guard_metrics import (
    GuardMetrics,
    GuardScores,
    scores_by,
    threshold_for_recall,
    validation_part,
)


def scores(probabilities: list[float], labels: list[int], threshold: float = 0.5) -> GuardScores:
    metrics = GuardMetrics(threshold)
    metrics.update(torch.tensor(probabilities), torch.tensor(labels))
    return metrics.compute()


def random_verdicts(num: int, *, seed: int, digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something of the labels; few digits make many ties."""
    rng = np.random.default_rng(seed)
    labels = rng.random(num) < 0.3
    probabilities = np.clip(rng.normal(0.35 + 0.3 * labels, 0.25), 0, 1).round(digits)
    return probabilities, labels


@pytest.mark.oracle
@pytest.mark.parametrize("digits", [1, 2, 12])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_figures_are_those_of_scikit_learn(digits: int, threshold: float) -> None:
    from sklearn import metrics as sk

    probabilities, labels = random_verdicts(500, seed=digits, digits=digits)
    ours = GuardMetrics(threshold)
    for start in range(0, 500, 64):
        part = slice(start, start + 64)
        ours.update(torch.from_numpy(probabilities[part]), torch.from_numpy(labels[part]))
    found = ours.compute()

    flagged = probabilities >= threshold
    (true_negative, false_positive), _ = sk.confusion_matrix(labels, flagged)
    assert (found.samples, found.unsafe, found.flagged) == (500, labels.sum(), flagged.sum())
    assert found.accuracy == pytest.approx(sk.accuracy_score(labels, flagged))
    assert found.recall == pytest.approx(sk.recall_score(labels, flagged))
    assert found.f1 == pytest.approx(sk.f1_score(labels, flagged))
    assert found.auprc == pytest.approx(sk.average_precision_score(labels, probabilities))
    rate = false_positive / (false_positive + true_negative)
    assert found.false_positive_rate == pytest.approx(rate)
    if flagged.any():
        assert found.precision == pytest.approx(sk.precision_score(labels, flagged))
    else:
        assert found.precision is None


def test_a_probability_at_the_threshold_is_flagged() -> None:
    assert scores([0.5, 0.5], [1, 0]).flagged == 2
    assert scores([0.4999999], [1]).flagged == 0


def test_probabilities_are_compared_in_their_own_precision() -> None:
    metrics = GuardMetrics(threshold=0.5 + 1e-12)
    metrics.update(torch.tensor([0.5, 0.5 + 2e-12], dtype=torch.float64), torch.tensor([0, 1]))
    assert metrics.compute().accuracy == 1.0


def test_without_unsafe_samples_what_measures_them_is_undefined() -> None:
    found = scores([0.1, 0.9], [0, 0])
    assert (found.recall, found.f1, found.auprc) == (None, None, None)
    assert (found.accuracy, found.precision, found.false_positive_rate) == (0.5, 0.0, 0.5)


def test_without_safe_samples_the_false_positive_rate_is_undefined() -> None:
    found = scores([0.1, 0.9], [1, 1])
    assert found.false_positive_rate is None
    assert (found.recall, found.precision, found.auprc) == (0.5, 1.0, 1.0)


def test_where_nothing_is_flagged_precision_is_undefined_and_f1_is_zero() -> None:
    found = scores([0.1, 0.2], [1, 0])
    assert found.precision is None
    assert (found.recall, found.f1) == (0.0, 0.0)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_samples_all_is_undefined() -> None:
    assert GuardMetrics().compute() == GuardScores(0, 0, 0, None, None, None, None, None, None)


def test_a_reset_metric_begins_anew() -> None:
    metrics = GuardMetrics()
    metrics.update(torch.tensor([0.9]), torch.tensor([1]))
    metrics.reset()
    metrics.update(torch.tensor([0.1, 0.2]), torch.tensor([0, 0]))
    assert metrics.compute().samples == 2


@pytest.mark.parametrize("wrong", [float("nan"), -0.1, 1.5], ids=["nan", "negative", "above 1"])
def test_what_is_no_probability_is_an_error(wrong: float) -> None:
    with pytest.raises(ValueError, match="is no probability; give values from 0 to 1"):
        scores([0.5, wrong], [0, 1])


def test_verdicts_and_labels_of_different_length_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"probabilities \(2,\) and labels \(1,\) must be one row"):
        scores([0.5, 0.5], [1])


def test_each_group_has_figures_of_its_own() -> None:
    found = scores_by(
        ["S2", "S1", None, "S2"],
        np.array([0.9, 0.1, 0.9, 0.2]),
        np.array([True, True, True, False]),
        threshold=0.5,
    )
    assert list(found) == ["S1", "S2"]
    assert found["S1"].recall == 0.0
    assert (found["S2"].samples, found["S2"].recall, found["S2"].accuracy) == (2, 1.0, 1.0)


def recall_at(threshold: float, probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float((probabilities[labels] >= threshold).mean())


@pytest.mark.parametrize("wanted", [0.01, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("digits", [1, 12])
def test_the_threshold_is_the_highest_that_reaches_the_recall(wanted: float, digits: int) -> None:
    probabilities, labels = random_verdicts(300, seed=7, digits=digits)
    threshold = threshold_for_recall(probabilities, labels, wanted)
    assert recall_at(threshold, probabilities, labels) >= wanted
    assert recall_at(np.nextafter(threshold, 2), probabilities, labels) < wanted


@pytest.mark.parametrize(
    ("wanted", "expected"), [(0.7, 0.4), (0.3, 0.8), (0.71, 0.3), (1.0, 0.1), (1e-9, 1.0)]
)
def test_a_recall_that_is_met_exactly_flags_no_sample_more(wanted: float, expected: float) -> None:
    unsafe = [n / 10 for n in range(1, 11)]
    assert threshold_for_recall([*unsafe, 0.05], [True] * 10 + [False], wanted) == expected


@pytest.mark.parametrize("wanted", [0.0, -0.5, 1.01, float("nan")])
def test_a_recall_out_of_range_is_an_error(wanted: float) -> None:
    with pytest.raises(ValueError, match="give a share above 0, at most 1"):
        threshold_for_recall([0.5], [True], wanted)


def test_without_unsafe_samples_there_is_no_threshold() -> None:
    with pytest.raises(ValueError, match="none of 2 samples is labelled unsafe"):
        threshold_for_recall([0.5, 0.4], [False, False], 0.9)


def test_the_validation_part_follows_content_and_seed_alone() -> None:
    keys = [str(n).encode() for n in range(4000)]
    part = validation_part(keys, share=0.25, seed=3)
    assert 0.22 < part.mean() < 0.28
    assert (validation_part(keys[::-1], share=0.25, seed=3) == part[::-1]).all()
    assert (validation_part(keys, share=0.25, seed=4) != part).any()
    assert not validation_part(keys, share=0.0, seed=3).any()
    assert validation_part(keys, share=1.0, seed=3).all()
