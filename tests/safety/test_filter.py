from pathlib import Path

import pytest
from word_guard import WordGuard

from fedsafe.safety.filter import SafetyFilter
from fedsafe.types import Conversation, Turn, Verdict


def sample(prompt: str, response: str) -> Conversation:
    return [
        Turn(role="system", content="be kind"),
        Turn(role="user", content=prompt),
        Turn(role="assistant", content=response),
    ]


@pytest.fixture(autouse=True)
def _cached_apart(own_cache: Path) -> None:
    """Verdicts of one test are not seen by another."""


def verdict(unsafe: float) -> Verdict:
    return Verdict(unsafe, (), "word-guard")


def test_a_sample_is_unsafe_from_the_threshold_on() -> None:
    strict = SafetyFilter(WordGuard(), threshold=0.3)
    assert [strict.is_unsafe(verdict(p)) for p in (0.0, 0.2999, 0.3, 1.0)] == [0, 0, 1, 1]
    assert SafetyFilter(WordGuard(), threshold=0.0).is_unsafe(verdict(0.0))
    assert not SafetyFilter(WordGuard(), threshold=1.0).is_unsafe(verdict(0.9999))


@pytest.mark.parametrize(
    ("part", "shown", "unsafe"),
    [
        ("pair", sample("red", "blue"), 0.1),
        ("prompt", sample("red", "blue")[:2], 0.9),
        ("response", [Turn(role="user", content="blue")], 0.1),
    ],
    ids=["pair", "prompt", "response"],
)
def test_the_guard_sees_the_part_that_it_judges(part, shown: Conversation, unsafe: float) -> None:
    guard = WordGuard("red")
    (judged,) = SafetyFilter(guard, judge=part).verdicts([sample("red", "blue")])
    assert judged.unsafe == unsafe
    assert guard.seen == [[shown]]


def test_another_threshold_or_policy_asks_no_guard_again() -> None:
    samples = [sample("a", "red"), sample("b", "blue")]
    first = SafetyFilter(WordGuard("red")).verdicts(samples)
    guard = WordGuard("red")
    for settings in ({"threshold": 0.05}, {"threshold": 0.95, "policy": "refuse"}):
        assert SafetyFilter(guard, **settings).verdicts(samples) == first
    assert guard.seen == []


def test_a_refusal_depends_on_the_seed_and_the_content_alone() -> None:
    samples = [sample(f"question {n}", "red") for n in range(60)]
    repair = SafetyFilter(WordGuard(), policy="refuse")
    refused = [repair.refused(each, seed=0) for each in samples]
    again = SafetyFilter(WordGuard("other"), policy="refuse", threshold=0.1)
    assert [again.refused(each, seed=0) for each in samples[::-1]] == refused[::-1]
    assert [repair.refused(each, seed=1) for each in samples] != refused
    assert all(new[:-1] == old[:-1] for new, old in zip(refused, samples, strict=True))
    assert {new[-1]["role"] for new in refused} == {"assistant"}
    assert len({new[-1]["content"] for new in refused}) > 12


def test_the_shipped_refusals_are_a_line_each_and_different() -> None:
    refusals = SafetyFilter(WordGuard(), policy="refuse")._refusals
    assert len(refusals) == len(set(refusals)) == 20
    assert all(10 < len(each) < 120 and each.endswith((".", "?")) for each in refusals)


def test_own_refusals_replace_the_shipped_ones(tmp_path: Path) -> None:
    file = tmp_path / "refusals.txt"
    file.write_text("  non merci  \n\n\n", encoding="utf-8")
    repair = SafetyFilter(WordGuard(), policy="refuse", refusals=str(file))
    assert repair.refused(sample("a", "b"), seed=3)[-1]["content"] == "non merci"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no file of refusals .*mine.txt; give one, or leave refusals out"),
        (b"\n  \n", r"file of refusals .*mine.txt is empty; write one refusal a line"),
        (b"d\xe9sol\xe9\n", r"refusals in .*mine.txt are not UTF-8 .* convert them"),
    ],
    ids=["missing", "empty", "not UTF-8"],
)
def test_a_file_that_holds_no_refusals_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SafetyFilter(WordGuard(), policy="refuse", refusals=str(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.1}, "threshold of the filter is 1.1; give a number from 0 to 1"),
        ({"threshold": float("nan")}, "threshold of the filter is nan"),
        ({"max_unsafe_share": -0.1}, "max_unsafe_share of the filter is -0.1; give a number"),
        ({"refusals": "a.txt"}, "refusals is 'a.txt', but policy 'drop' uses none; leave it out"),
    ],
    ids=["threshold", "nan", "share", "unused refusals"],
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SafetyFilter(WordGuard(), **settings)


def test_too_much_unsafe_is_explained() -> None:
    drop = SafetyFilter(WordGuard(), threshold=0.2)
    drop.check_share(700, num_judged=1000)
    message = (
        r"word-guard calls 1,701 of 2,000 samples unsafe \(85%\), more than max_unsafe_share 0.7; "
        r".*template, the threshold 0.2 is too low .*language.* policy: keep, or raise"
    )
    with pytest.raises(ValueError, match=message):
        drop.check_share(1701, num_judged=2000)
    SafetyFilter(WordGuard(), policy="keep").check_share(2000, num_judged=2000)
    SafetyFilter(WordGuard(), max_unsafe_share=1.0).check_share(2000, num_judged=2000)


def test_the_identity_names_what_decides_a_samples_fate() -> None:
    one = SafetyFilter(WordGuard("red")).identity
    assert one.startswith("drop, pair, threshold 0.5, word-guard ")
    others = [
        SafetyFilter(WordGuard("blue")),
        SafetyFilter(WordGuard("red"), threshold=0.51),
        SafetyFilter(WordGuard("red"), policy="keep"),
        SafetyFilter(WordGuard("red"), judge="response"),
    ]
    assert len({one, *(each.identity for each in others)}) == 5
    assert SafetyFilter(WordGuard("red"), record_text=True, max_unsafe_share=0.1).identity == one
