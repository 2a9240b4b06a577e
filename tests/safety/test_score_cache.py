import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from word_guard import WordGuard

from fedsafe.safety import score_cache
from fedsafe.safety.score_cache import ScoreCache, conversation_key
from fedsafe.types import Conversation, Turn, Verdict


def conversation(text: str, answer: str = "yes") -> Conversation:
    return [Turn(role="user", content=text), Turn(role="assistant", content=answer)]


def conversations(count: int) -> list[Conversation]:
    return [conversation(f"question {n}", "red" if n % 3 == 0 else "blue") for n in range(count)]


class MoodyGuard(WordGuard):
    """Its probabilities depend a little on what is judged together, as those of matrices do."""

    def __init__(self, mood: float = 1.0) -> None:
        super().__init__("red")
        self.mood = mood

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        noise = sum(len(each[0]["content"]) for each in conversations) * 1e-12 * self.mood
        return [v._replace(unsafe=v.unsafe + noise) for v in super().judge(conversations)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cache, "CHUNK_SIZE", 4)


def test_verdicts_come_in_order_and_each_conversation_is_judged_once(tmp_path: Path) -> None:
    guard = WordGuard("red")
    asked = [*conversations(6), conversations(6)[3], conversation("another", "red")]
    verdicts = ScoreCache(guard, tmp_path).verdicts(asked)
    assert verdicts == WordGuard("red").judge(asked)
    assert [len(chunk) for chunk in guard.seen] == [4, 3]
    assert [c for chunk in guard.seen for c in chunk] == [*asked[:6], asked[7]]


def test_what_was_judged_is_not_judged_again_and_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    class Precise(WordGuard):
        def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
            judged = super().judge(conversations)
            return [
                Verdict(1 / (3 + n), ("S1", "S10"), v.guard, shortened=True)
                for n, v in enumerate(judged)
            ]

    first = ScoreCache(Precise("red"), tmp_path).verdicts(conversations(3))
    guard = Precise("red")
    assert ScoreCache(guard, tmp_path).verdicts(conversations(3)[::-1]) == first[::-1]
    assert guard.seen == []
    assert first[1] == Verdict(1 / 4, ("S1", "S10"), "word-guard", shortened=True)
    assert first[0].unsafe == 1 / 3


def test_nothing_to_judge_is_no_verdict(tmp_path: Path) -> None:
    assert ScoreCache(WordGuard(), tmp_path).verdicts([]) == []


def test_a_scan_killed_and_resumed_judges_the_same_chunks(tmp_path: Path) -> None:
    class Killed(MoodyGuard):
        def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
            if len(self.seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().judge(conversations)

    asked = [*conversations(17), *conversations(5)]
    whole = MoodyGuard()
    expected = ScoreCache(whole, tmp_path / "whole").verdicts(asked)
    alone = [MoodyGuard().judge([each])[0] for each in asked]
    assert expected != alone, "the guard is not moody"

    cut = ScoreCache(Killed(), tmp_path / "cut")
    child = multiprocessing.get_context("fork").Process(target=cut.verdicts, args=(asked,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL

    resumed = MoodyGuard()
    assert ScoreCache(resumed, tmp_path / "cut").verdicts(asked) == expected
    assert resumed.seen == whole.seen[2:]


def test_scans_at_once_agree_on_every_verdict(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    asked = conversations(40)

    def scan(mood: int) -> list[Verdict]:
        return ScoreCache(MoodyGuard(mood), tmp_path).verdicts(asked)

    with ThreadPoolExecutor(6) as pool:
        verdicts = list(pool.map(scan, range(6)))
    assert all(each == verdicts[0] for each in verdicts)
    assert scan(99) == verdicts[0]
    assert not recwarn.list


def test_a_changed_guard_judges_anew_and_says_so(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    asked = conversations(2)
    ScoreCache(WordGuard("red"), tmp_path).verdicts(asked)
    ScoreCache(WordGuard("red"), tmp_path).verdicts(asked)
    ScoreCache(WordGuard("blue", name="word-guard-2"), tmp_path).verdicts(asked)
    assert not recwarn.list
    changed = WordGuard("blue")
    with pytest.warns(UserWarning, match=r"word-guard is not the one whose .* is judged anew"):
        verdicts = ScoreCache(changed, tmp_path).verdicts(asked)
    assert verdicts == WordGuard("blue").judge(asked)
    assert len(changed.seen) == 1


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1], ids=str)
def test_what_is_no_probability_is_refused_and_not_kept(tmp_path: Path, value: float) -> None:
    class Broken(WordGuard):
        def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
            return [v._replace(unsafe=value) for v in super().judge(conversations)]

    with pytest.raises(ValueError, match=rf"word-guard gave {value} as a probability of unsafe"):
        ScoreCache(Broken("red"), tmp_path).verdicts(conversations(2))
    healthy = WordGuard("red")
    ScoreCache(healthy, tmp_path).verdicts(conversations(2))
    assert len(healthy.seen) == 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cache = ScoreCache(WordGuard("red"), tmp_path)
    cache.verdicts(conversations(1))
    (file,) = tmp_path.rglob("*.db")
    file.write_bytes(b"this is no database " * 100)
    with pytest.raises(OSError, match=rf"{file.name} cannot be read or written .* delete the file"):
        cache.verdicts(conversations(1))


def test_no_text_is_kept(tmp_path: Path) -> None:
    ScoreCache(WordGuard("red"), tmp_path).verdicts([conversation("a planted secret", "red wine")])
    (file,) = tmp_path.rglob("*.db")
    assert not any(word in file.read_bytes() for word in (b"planted", b"secret", b"wine"))


def test_verdicts_are_kept_in_the_cache_by_the_guards_name(own_cache: Path) -> None:
    ScoreCache(WordGuard("red", name="a/guard of mine")).verdicts(conversations(1))
    assert [f.parent for f in own_cache.rglob("*.db")] == [own_cache / "verdicts/a_guard_of_mine"]


def test_progress_shows_where_there_is_much_to_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ScoreCache(WordGuard("red"), tmp_path)
    cache.verdicts(conversations(4))
    assert capsys.readouterr() == ("", "")
    cache.verdicts(conversations(12))
    out, err = capsys.readouterr()
    assert out == ""
    assert "Judging with word-guard" in err
    assert "question" not in err


def test_a_key_tells_roles_turns_and_contents_apart() -> None:
    different: list[Conversation] = [
        conversation("a", "b"),
        conversation("ab", ""),
        conversation("", "ab"),
        conversation("b", "a"),
        conversation("a", "b")[:1],
        [Turn(role="user", content="a"), Turn(role="user", content="b")],
    ]
    assert len({conversation_key(each) for each in different}) == len(different)
    assert conversation_key(conversation("a", "b")) == conversation_key(conversation("a", "b"))
