"""MT-Bench's ratings and comparisons, of replies in a file and with a scripted judge."""

from collections.abc import Callable

import pytest
from mt_bench_rows import answers, ask_all
from scripted_judge import ScriptedJudge

from fedsafe.evaluation.judge import Judgement
from fedsafe.evaluation.mt_bench import MTBench
from fedsafe.evaluation.scores import BenchmarkScores

pytestmark = pytest.mark.usefixtures("own_cache")

Write = Callable[..., str]


@pytest.fixture
def replies(write: Write) -> str:
    """Replies to all questions."""
    return write("replies.jsonl", answers(81, 82, 83, 84, text="mine"))


def rate_by_turn(text: str) -> str:
    return "Rating: [[3]]" if "second question" in text else "Rating: [[8]]"


def test_the_score_is_the_mean_of_both_turns(write: Write, replies: str) -> None:
    judge = ScriptedJudge(rate_by_turn)
    benchmark = MTBench(write(), replies=replies, judge=judge, reference_categories=[])
    records = ask_all(benchmark)
    assert records[0].scores == {"score": 5.5, "score_turn_1": 8.0, "score_turn_2": 3.0}
    assert records[0].details["words"] == ["Rating: [[8]]", "Rating: [[3]]"]
    scores = BenchmarkScores(benchmark.measures, benchmark.categories)
    scores.update(records)
    found = scores.compute()
    assert (found["score"], found["stem/score"], found["num_unscored"]) == (5.5, 5.5, 0)
    assert (judge.num_checks, judge.num_releases) == (1, 1)


def test_a_judge_that_fails_in_the_middle_leaves_replies_scores_and_reasons(
    write: Write, replies: str
) -> None:
    judge = ScriptedJudge(rate_by_turn, dies_after=3)  # asks the last first
    benchmark = MTBench(write(), replies=replies, judge=judge, reference_categories=[])
    with pytest.warns(UserWarning, match="HAS STOPPED: the judge is gone"):
        first, second, third, fourth = ask_all(benchmark)
    assert fourth.scores == {"score": 5.5, "score_turn_1": 8.0, "score_turn_2": 3.0}
    assert third.scores == {"score": None, "score_turn_1": None, "score_turn_2": 3.0}
    assert [each.problem for each in (first, second, third)] == ["judge stopped answering"] * 3
    assert [len(each.conversation) for each in (first, second, third, fourth)] == [4] * 4
    # a later batch has what was said before, and asks nothing
    judge.dies_after = None
    assert ask_all(benchmark) == [first, second, third, fourth]
    assert len(judge.asked) == 3
    # a later run asks only what is missing
    again = MTBench(write(), replies=replies, judge=judge, reference_categories=[])
    assert {record.scores["score"] for record in ask_all(again)} == {5.5}
    assert len(judge.asked) == 8


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        pytest.param("Rating: seven", "unparsable rating", id="unparsable"),
        pytest.param("[[0]]", "rating out of range", id="range"),
        pytest.param(Judgement(None, "judge timed out"), "judge timed out", id="no words"),
    ],
)
def test_a_missing_rating_is_no_zero_and_leaves_the_other_turn(
    write: Write, replies: str, second: str | Judgement, problem: str
) -> None:
    def say(text: str) -> str | Judgement:
        return second if "stem 2" in text else "[[9]]"

    benchmark = MTBench(write(), replies=replies, judge=ScriptedJudge(say), reference_categories=[])
    records = ask_all(benchmark)
    assert [record.problem for record in records] == [None, None, problem, None]
    assert records[2].scores == {"score": None, "score_turn_1": 9.0, "score_turn_2": None}
    scores = BenchmarkScores(benchmark.measures, benchmark.categories)
    scores.update(records)
    assert (scores.compute()["score"], scores.compute()["num_unscored"]) == (9.0, 1)


def test_references_are_shown_where_they_belong_and_missed_where_they_lack(
    write: Write, replies: str
) -> None:
    judge = ScriptedJudge(lambda text: "[[5]]")
    files = {"references": write("reference.jsonl", answers(82))}
    categories = ["math", "gardening"]
    benchmark = MTBench(
        write(), replies=replies, judge=judge, reference_categories=categories, **files
    )
    with pytest.warns(UserWarning, match=r"1 of 4 questions of mt_bench \(gardening\) have no ref"):
        records = ask_all(benchmark)
    assert [record.problem for record in records] == [None, None, None, "no reference answer"]
    assert records[3].scores == dict.fromkeys(benchmark.measures)
    shown = [text for text in judge.asked if "<reference" in text]
    assert len(shown) == 2
    assert all("math" in text and "right 82.1" in text for text in shown)
    assert sorted("right 82.2" in text for text in shown) == [False, True]


def test_nothing_is_asked_twice(write: Write, replies: str) -> None:
    for num_asked, judge in ((8, ScriptedJudge(rate_by_turn)), (0, ScriptedJudge(rate_by_turn))):
        records = ask_all(MTBench(write(), replies=replies, judge=judge, reference_categories=[]))
        assert len(judge.asked) == num_asked
        assert {record.scores["score"] for record in records} == {5.5}


# ---- comparisons ---------------------------------------------------------------------------------


def prefer(marker: str) -> Callable[[str], str]:
    """A judge that likes replies with a word, whichever place they are in."""
    return lambda text: f"[[{'A' if text.index(marker) < text.index('other') else 'B'}]]"


@pytest.mark.parametrize(
    ("say", "expected"),
    [
        pytest.param(prefer("mine"), (100.0, 0.0, 0.0, 100.0), id="better"),
        pytest.param(
            lambda text: prefer("mine")(text).translate({65: 66, 66: 65}),
            (0.0, 0.0, 100.0, 0.0),
            id="worse",
        ),
        pytest.param(lambda text: "[[C]]", (0.0, 100.0, 0.0, 50.0), id="tie"),
        pytest.param(lambda text: "[[A]]", (0.0, 100.0, 0.0, 50.0), id="likes the first place"),
        pytest.param(lambda text: "[[B]]", (0.0, 100.0, 0.0, 50.0), id="likes the second place"),
        pytest.param(
            lambda text: "[[C]]" if text.index("mine") < text.index("other") else "[[B]]",
            (0.0, 100.0, 0.0, 50.0),
            id="agrees with itself once",
        ),
        pytest.param(
            lambda text: prefer("mine")(text) if "second question" in text else "[[C]]",
            (50.0, 50.0, 0.0, 75.0),
            id="second turn better",
        ),
    ],
)
def test_a_win_is_one_in_both_orders(
    write: Write,
    replies: str,
    say: Callable[[str], str],
    expected: tuple[float, ...],
) -> None:
    benchmark = MTBench(
        write(),
        replies=replies,
        judge=ScriptedJudge(say),
        mode="pairwise",
        baseline=write("baseline.jsonl", answers(81, 82, 83, 84, text="other")),
        reference_categories=[],
    )
    for record in ask_all(benchmark):
        assert tuple(record.scores.values()) == expected
        assert tuple(record.scores) == benchmark.measures
        assert record.problem is None


def test_a_comparison_without_a_verdict_or_a_baseline_is_counted(
    write: Write, replies: str
) -> None:
    benchmark = MTBench(
        write(),
        replies=replies,
        judge=ScriptedJudge(lambda text: "hm" if "writing 2" in text else "[[C]]"),
        mode="pairwise",
        baseline=write("baseline.jsonl", answers(81, 82, 83, text="other")),
        reference_categories=[],
    )
    records = ask_all(benchmark)
    problems = ["unparsable verdict", None, None, "no reply of the baseline"]
    assert [record.problem for record in records] == problems
    assert records[0].scores == records[3].scores == dict.fromkeys(benchmark.measures)
