"""A guard's verdicts where several ranks judge: those of one, to the last bit."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from thread_peers import together
from word_guard import WordGuard

from fedsafe.peers import Peers
from fedsafe.safety import score_cache
from fedsafe.safety.guard import UnjudgeableError
from fedsafe.safety.score_cache import ScoreCache
from fedsafe.types import Conversation, Turn, Verdict

Judged = list[tuple[dict[int, Verdict], dict[int, str]]]


def conversations(*texts: str) -> list[Conversation]:
    return [[Turn(role="user", content=text)] for text in texts]


class MoodyGuard(WordGuard):
    """Its probabilities depend on what is judged together; cannot judge what holds `long`."""

    def __init__(self) -> None:
        super().__init__("red")

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        texts = [each[-1]["content"] for each in conversations]
        if reasons := {place: "too long" for place, text in enumerate(texts) if "long" in text}:
            raise UnjudgeableError(reasons)
        noise = sum(len(text) for text in texts) * 1e-9
        return [v._replace(unsafe=v.unsafe - noise) for v in super().judge(conversations)]


WINDOWS = [
    conversations("a", "red b", "long c", "a"),
    conversations("d", "a", "long c", "red b", "e"),  # most of it was in the first
    conversations("a", "red b"),  # all of it was
    conversations("f", "long g"),
    conversations("h", "f", "red iii"),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cache, "CHUNK_SIZE", 5)


def one_after_another(folder: Path) -> Judged:
    cache = ScoreCache(MoodyGuard(), folder)
    return [cache.judge_windows([window])[0] for window in WINDOWS]


@pytest.mark.parametrize("disks", ["shared", "own"])
@pytest.mark.parametrize("size", [2, 3])
def test_windows_that_ranks_share_have_the_verdicts_of_one(
    tmp_path: Path, size: int, disks: str
) -> None:
    expected = one_after_another(tmp_path / "one")
    assert expected[0][1] == {2: "too long"}
    alone = MoodyGuard().judge(conversations("d"))[0]
    assert expected[1][0][0] != alone, "the guard is not moody"

    def judge(peers: Peers) -> Judged:
        folder = tmp_path / ("all" if disks == "shared" else f"disk-{peers.index}")
        cache = ScoreCache(MoodyGuard(), folder)
        found: Judged = []
        for begin in range(0, len(WINDOWS), size):
            found += cache.judge_windows(WINDOWS[begin : begin + size], peers=peers)
        return found

    assert together(size, judge) == [expected] * size


@pytest.mark.parametrize("size", [2, 3])
def test_chunks_that_ranks_share_have_the_verdicts_of_one(tmp_path: Path, size: int) -> None:
    asked = conversations(*(f"{'red ' * (n % 3 == 0)}{'x' * (n % 7)}{n}" for n in range(23)), "0")
    expected = ScoreCache(MoodyGuard(), tmp_path / "one").verdicts(asked)
    guards = [MoodyGuard() for _ in range(size)]

    def judge(peers: Peers) -> list[Verdict]:
        cache = ScoreCache(guards[peers.index], tmp_path / f"disk-{peers.index}")
        return cache.verdicts(asked, peers=peers)

    assert together(size, judge) == [expected] * size
    judged = [str(each) for guard in guards for chunk in guard.seen for each in chunk]
    assert len(judged) == len(set(judged)) == 24  # each once, by one of them


def test_the_first_rank_s_disk_has_all_verdicts(tmp_path: Path) -> None:
    """Where the command goes on, it says what is missing."""

    def judge(peers: Peers) -> None:
        ScoreCache(MoodyGuard(), tmp_path / f"disk-{peers.index}").verdicts(asked, peers=peers)

    asked = conversations(*map(str, range(12)))
    together(2, judge)
    again = MoodyGuard()
    ScoreCache(again, tmp_path / "disk-0").verdicts(asked)
    assert again.seen == []


def test_what_is_on_the_first_rank_s_disk_nobody_judges_again(tmp_path: Path) -> None:
    asked = conversations(*map(str, range(12)))
    expected = ScoreCache(MoodyGuard(), tmp_path / "disk-0").verdicts(asked)
    guards = MoodyGuard(), MoodyGuard()

    def judge(peers: Peers) -> list[Verdict]:
        cache = ScoreCache(guards[peers.index], tmp_path / f"disk-{peers.index}")
        return cache.verdicts(asked, peers=peers)

    assert together(2, judge) == [expected, expected]
    assert [guard.seen for guard in guards] == [[], []]


def test_a_conversation_that_cannot_be_judged_is_named_on_all_ranks(tmp_path: Path) -> None:
    asked = conversations(*"abcdef", "long one", "g", "another long one")

    def judge(peers: Peers) -> str:
        with pytest.raises(UnjudgeableError) as caught:
            ScoreCache(MoodyGuard(), tmp_path / f"{peers.size}").verdicts(asked, peers=peers)
        return str(caught.value)

    assert together(2, judge) == [judge(Peers())] * 2
    assert judge(Peers()) == "conversation 6: too long (and 1 more)"
