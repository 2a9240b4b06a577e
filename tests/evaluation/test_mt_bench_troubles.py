"""MT-Bench through a server that does what servers do: every question has a score or a reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mt_bench_rows import answers, ask_all
from openai_server import OpenAIServer, Response, Script, error, late, says

from fedsafe.evaluation.mt_bench import MTBench
from fedsafe.evaluation.openai_judge import OpenAIJudge
from fedsafe.evaluation.scores import BenchmarkScores

pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("own_cache")

Write = Callable[..., str]


TROUBLES: dict[str, tuple[Response, int, str | None]] = {
    "late": (late(1.0), 9, "judge timed out"),
    "late once": (late(1.0), 1, None),
    "busy": (error(429, retry_after="0.05"), 9, "judge overloaded"),
    "busy once": (error(429, retry_after="0.05"), 1, None),
    "broken": (error(500), 9, "judge's server failed"),
    "broken twice": (error(503), 2, None),
    "no JSON": (Response("{oops"), 9, "judge's answer malformed"),
    "no JSON once": (Response("{oops"), 1, None),
    "no rating": (says("It is fine."), 9, "unparsable rating"),
    "eleven": (says("[[11]]"), 9, "rating out of range"),
    "refuses": (says(None, refusal="no"), 9, "judge refused"),
    "filtered": (error(400, code="content_filter"), 9, "judge refused"),
    "silent": (says(None), 9, "judge said nothing"),
}
"""What the server answers, how many times, and what is then counted."""


def troubled(text: str, number: int) -> Response:
    """Trouble at the turns that name it."""
    for name, (response, times, _) in TROUBLES.items():
        if f"trouble: {name}." in text and number < times:
            return response
    return says("Rating: [[6]]")


def watched(script: Script, answered: set[str]) -> Script:
    """The same, and a note of the prompts that got words in time."""

    def respond(text: str, number: int) -> Response:
        response = script(text, number)
        message = '"content": "'  # of a completion that is not null
        if response.status == 200 and not response.seconds and message in response.body:
            answered.add(text)
        return response

    return respond


@pytest.mark.parametrize("turn", [1, 2])
def test_every_question_ends_with_a_score_or_a_counted_reason(write: Write, turn: int) -> None:
    rows = [{"question_id": n, "category": "stem", "turns": ["a", "b"]} for n in range(20)]
    texts = [f"trouble: {name}." for name in TROUBLES] + ["fine"] * (20 - len(TROUBLES))
    replies = [
        {"question_id": n, "choices": [{"turns": [f"r{n}", text] if turn == 2 else [text, "r"]}]}
        for n, text in enumerate(texts)
    ]
    answered: set[str] = set()
    server = OpenAIServer(watched(troubled, answered))
    settings = {"timeout_seconds": 0.4, "max_retries": 2, "retry_wait_seconds": 0.01}
    with server.running() as url:
        benchmark = MTBench(
            write(rows=rows),
            judge=OpenAIJudge("m", url, None, **settings),  # type: ignore[arg-type]
            replies=write("replies.jsonl", replies),
        )
        records = ask_all(benchmark)
        num_asked = len(server.requests)
        again = ask_all(benchmark)
    expected = [problem for _, _, problem in TROUBLES.values()] + [None] * (20 - len(TROUBLES))
    assert [record.problem for record in records] == expected
    for record in records:
        assert (record.scores["score"] == 6.0) == (record.problem is None)
        assert record.scores["score"] in (6.0, None)
    assert again == records
    # the second time, those that had no words are asked again, and nothing else
    assert set(server.prompts[num_asked:]) == set(server.prompts) - answered


@pytest.mark.real_data
def test_the_real_questions_through_a_troubled_server(real_data: Path, write: Write) -> None:
    """80 questions, 160 replies, a third of the requests in trouble; stopped and gone on.

    The judge that stops is asked no more, and a second run asks for what the first did not get.
    """
    folder = real_data / "mt_bench"
    troubles = [response for response, *_ in TROUBLES.values()]

    def script(text: str, number: int) -> Response:
        draw = (sum(map(ord, text)) + number) % 39
        if len(server.requests) == 100:
            return error(402)  # the money ends in the middle
        return troubles[draw] if draw < len(troubles) else says(f"[[{draw % 10 + 1}]]")

    answered: set[str] = set()
    server = OpenAIServer(watched(script, answered))
    numbers = range(81, 161)
    file = write("replies.jsonl", answers(*numbers))

    def benchmark_at(url: str) -> MTBench:
        return MTBench(
            str(folder / "question.jsonl"),
            references=str(folder / "reference_answer" / "gpt-4.jsonl"),
            prompts=str(folder / "judge_prompts.jsonl"),
            judge=OpenAIJudge(
                "m", url, None, timeout_seconds=0.4, max_retries=2, retry_wait_seconds=0.01
            ),
            replies=file,
        )

    with server.running() as url:
        with pytest.warns(UserWarning, match=r"THE JUDGE m HAS STOPPED: .* has no money left"):
            stopped = ask_all(benchmark_at(url))
        num_before, answered_before = len(server.requests), set(answered)
        benchmark = benchmark_at(url)
        records = ask_all(benchmark)
    assert 30 < sum(record.problem == "judge stopped answering" for record in stopped) < 70
    assert {len(record.conversation) for record in stopped} == {4}
    assert len(answered_before) > 40
    assert not answered_before & set(server.prompts[num_before:])
    assert len(records) == 80
    for record in records:
        assert (record.scores["score"] is None) == (record.problem is not None)
    scored = [record for record in records if record.problem is None]
    assert 30 < len(scored) < 80
    scores = BenchmarkScores(benchmark.measures, benchmark.categories)
    scores.update(records)
    found = scores.compute()
    mean = sum(record.scores["score"] or 0.0 for record in scored) / len(scored)
    assert float(found["score"]) == pytest.approx(mean)
    assert int(found["num_unscored"]) == 80 - len(scored)
