from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest

from fedsafe.evaluation.guard_evaluation import WantedRecall, labelled_only, measure_guard
from fedsafe.evaluation.guard_metrics import validation_part
from fedsafe.safety.guard import Guard
from fedsafe.safety.score_cache import conversation_key
from fedsafe.types import Conversation, Verdict


class LengthGuard(Guard):
    """The longer what it is shown, the more unsafe; tells what it was shown."""

    name = "length"
    identity = "length"

    def __init__(self) -> None:
        self.seen: list[Conversation] = []

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        self.seen += conversations
        sizes = [sum(len(turn["content"]) for turn in each) for each in conversations]
        return [Verdict(size / 100, (), self.name, shortened=size > 90) for size in sizes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSAFE_CACHE", str(tmp_path))


def samples(*rows: tuple[int, str | None]) -> datasets.Dataset:
    """Samples of so many characters."""
    return datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": "a" * (size - 1)},
                    {"role": "assistant", "content": "b"},
                ],
                "label": label,
                "category": None if label == "safe" else "S1",
                "client": None,
            }
            for size, label in rows
        ]
    )


def test_the_guard_is_scored_on_what_it_is_shown() -> None:
    guard = LengthGuard()
    result = measure_guard(guard, samples((80, "unsafe"), (20, "safe")), judge="prompt")
    assert all(turn["role"] == "user" for each in guard.seen for turn in each)
    assert result.probabilities.tolist() == [0.79, 0.19]
    assert result.labels.tolist() == [True, False]
    assert result.overall.accuracy == 1.0
    assert list(result.by_category) == ["S1"]
    assert result.by_client == {}
    assert result.name == "length"


def test_measuring_again_judges_nothing_again() -> None:
    data = samples((80, "unsafe"), (20, "safe"))
    measure_guard(LengthGuard(), data)
    again = LengthGuard()
    result = measure_guard(again, data, name="again", threshold=0.1)
    assert again.seen == []
    assert (result.name, result.overall.flagged) == ("again", 2)


def test_a_chosen_threshold_and_its_measure_share_no_conversation() -> None:
    rows = [(size, "unsafe" if size > 30 else "safe") for size in range(2, 100)]
    data = samples(*rows, *rows)
    result = measure_guard(LengthGuard(), data, wanted=WantedRecall(0.9, 0.5, seed=1))
    measured = result.probabilities.tolist()
    assert result.choice is not None
    assert result.choice.samples + len(measured) == len(data)
    # each is there twice: both copies are measured, or neither
    assert sorted(measured) == sorted(list(set(measured)) * 2)
    chosen_on = [size / 100 for size, label in rows if label == "unsafe"]
    chosen_on = [each for each in chosen_on if each not in measured]
    assert result.choice.recall == np.mean(np.array(chosen_on) >= result.threshold) >= 0.9
    assert result.shortened == sum(each > 0.9 for each in measured)
    assert result.as_json()["choice"]["given"]["samples"] == len(measured)


def test_the_threshold_is_chosen_on_the_validation_part_alone() -> None:
    sizes = range(2, 100)
    messages = samples(*((size, "safe") for size in sizes))["messages"]
    keys = [conversation_key(each) for each in messages]
    part = validation_part(keys, share=0.5, seed=1)
    # the unsafe are longer there than elsewhere
    labels = [size > (60 if there else 10) for size, there in zip(sizes, part, strict=True)]
    data = samples(*((s, "unsafe" if u else "safe") for s, u in zip(sizes, labels, strict=True)))
    result = measure_guard(LengthGuard(), data, wanted=WantedRecall(1.0, 0.5, seed=1))
    shortest = min(s for s, there in zip(sizes, part, strict=True) if there and s > 60)
    assert result.threshold == shortest / 100
    assert result.choice is not None
    assert result.choice.recall == 1.0
    assert result.overall.recall is not None
    assert result.overall.recall < 0.7


def test_too_few_samples_to_choose_on_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 samples are too few to set a share"):
        measure_guard(LengthGuard(), samples((80, "unsafe")), wanted=WantedRecall(0.9))


def test_without_unsafe_samples_no_threshold_is_chosen() -> None:
    data = samples(*((size, "safe") for size in range(2, 30)))
    with pytest.raises(ValueError, match="is labelled unsafe, so no threshold has a recall"):
        measure_guard(LengthGuard(), data, wanted=WantedRecall(0.9))


def test_only_labelled_samples_are_left() -> None:
    data = samples((80, "unsafe"), (50, None), (20, "safe"))
    assert labelled_only(data)["label"] == ["unsafe", "safe"]
    with pytest.raises(ValueError, match=r"none of 1 samples has a label.*a field `label`"):
        labelled_only(samples((50, None)))
