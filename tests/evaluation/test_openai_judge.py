import json
import os
import signal
import sys
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from asked_judge import FAST, KEY, ask, ask_server, prompt
from openai_server import OpenAIServer, Response, error, late, says
from warm import Started, start_python

from fedsafe.evaluation import judge as reasons
from fedsafe.evaluation.judge import Judgement
from fedsafe.evaluation.judge_cache import judge_all
from fedsafe.evaluation.openai_judge import OpenAIJudge

pytest.importorskip("openai")

NO_JSON = Response("{oops")
HTML = Response("<html>proxy</html>", content_type="text/html")
NO_CHOICES = Response('{"object": "chat.completion", "choices": []}')
PARTS = says(None, content=[{"type": "text", "text": "[[5]]"}])


def test_each_prompt_gets_its_own_answer_whichever_comes_first() -> None:
    def script(text: str, number: int) -> Response:
        return Response(says(f"{text} [[5]]").body, seconds=0.05 if text < "c" else 0.0)

    assert [each.text for each in ask_server(script, "abcdef")] == [f"{c} [[5]]" for c in "abcdef"]


def test_a_request_holds_the_settings_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOSE_KEY", f" {KEY}\n")
    server = OpenAIServer(lambda text, number: says("[[5]]"), key=KEY)
    with server.running() as url:
        judge = OpenAIJudge(
            "m",
            url,
            "GOOSE_KEY",
            temperature=None,
            max_tokens=None,
            request_fields={"max_completion_tokens": 9},
        )
        judge.check()
        ask(judge, ["a"])
        ask(OpenAIJudge("m", url, "GOOSE_KEY"), ["b"])
    first, second = (request.body for request in server.requests)
    assert first == {"model": "m", "messages": prompt("a"), "max_completion_tokens": 9}
    assert second == {
        "model": "m",
        "messages": prompt("b"),
        "temperature": 0.0,
        "max_tokens": 2048,
    }
    assert server.num_refused == 0


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        pytest.param(error(429, retry_after="0.01"), reasons.OVERLOADED, id="429"),
        pytest.param(error(429, "see billing to raise it"), reasons.OVERLOADED, id="429 no wait"),
        pytest.param(error(500), reasons.FAILED, id="500"),
        pytest.param(error(529, retry_after="soon"), reasons.FAILED, id="529"),
        pytest.param(
            error(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"), reasons.FAILED, id="a date"
        ),
        pytest.param(NO_JSON, reasons.MALFORMED, id="no JSON"),
        pytest.param(HTML, reasons.MALFORMED, id="HTML"),
        pytest.param(NO_CHOICES, reasons.MALFORMED, id="no choices"),
        pytest.param(Response("null"), reasons.MALFORMED, id="null"),
        pytest.param(PARTS, reasons.MALFORMED, id="content in parts"),
        pytest.param(late(1.0), reasons.TIMED_OUT, id="late"),
    ],
)
def test_trouble_is_tried_again_and_then_counted(trouble: Response, reason: str) -> None:
    server = OpenAIServer(
        lambda text, number: says("[[5]]") if (text, number) == ("passes", 2) else trouble
    )
    with server.running() as url:
        found = ask(OpenAIJudge("m", url, **FAST), ["passes", "stays"])
    assert found == [Judgement("[[5]]"), Judgement(None, reason)]
    assert sorted(server.prompts) == ["passes"] * 3 + ["stays"] * 3


@pytest.mark.timeout(20)  # nobody waits an hour
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(says(None, refusal="I would rather not."), reasons.REFUSED, id="refusal"),
        pytest.param(says("", finish_reason="content_filter"), reasons.REFUSED, id="filter"),
        pytest.param(error(400, code="content_filter"), reasons.REFUSED, id="Azure's filter"),
        pytest.param(error(403, "Input was flagged"), reasons.REFUSED, id="moderation"),
        pytest.param(says("  "), reasons.SILENT, id="nothing"),
        pytest.param(says(None, finish_reason="length"), reasons.CUT_OFF, id="only thoughts"),
        pytest.param(error(400, code="context_length_exceeded"), reasons.TOO_LONG, id="long"),
        pytest.param(error(413), reasons.TOO_LONG, id="413"),
        pytest.param(error(429, retry_after="3600"), reasons.OVERLOADED, id="in an hour"),
        pytest.param(
            error(503, retry_after="Wed, 21 Oct 2099 07:28:00 GMT"), reasons.FAILED, id="a far date"
        ),
        pytest.param(error(422), reasons.REJECTED, id="422"),
    ],
)
def test_what_no_further_try_would_change_is_counted_at_once(answer: Response, reason: str) -> None:
    server = OpenAIServer(lambda text, number: answer)
    with server.running() as url:
        assert ask(OpenAIJudge("m", url, **FAST), ["a"]) == [Judgement(None, reason)]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        pytest.param(error(401), "does not take a request without a key", id="401"),
        pytest.param(error(403), "does not take a request without a key", id="403"),
        pytest.param(error(404), "has no model m; check model and base_url", id="404"),
        pytest.param(error(402), "has no money left", id="402"),
        pytest.param(error(429, code="insufficient_quota"), "has no money left", id="quota"),
        pytest.param(error(405), "takes no such requests; check base_url", id="405"),
    ],
)
def test_what_no_request_can_pass_stops_at_once(answer: Response, problem: str) -> None:
    server = OpenAIServer(lambda text, number: answer)
    with server.running() as url, pytest.raises(ValueError, match=rf"{problem}.*\(HTTP 4\d\d\)"):
        ask(OpenAIJudge("m", url, max_concurrency=2, **FAST), "abcdefghijklmnopqrstuvwxyz")
    assert len(server.requests) <= 3


def test_answers_that_came_before_the_end_of_the_money_are_given() -> None:
    def script(text: str, number: int) -> Response:
        return says("[[5]]") if text < "d" else error(402)

    found = []

    def collect(url: str) -> None:
        judge = OpenAIJudge("m", url, max_concurrency=1, **FAST)
        found.extend(place for place, _ in judge.answers([prompt(each) for each in "abcdef"]))

    with OpenAIServer(script).running() as url, pytest.raises(ValueError, match="no money left"):
        collect(url)
    assert found == [0, 1, 2]


@pytest.mark.timeout(20)
def test_nobody_waits_for_a_judge_that_cannot_judge() -> None:
    def script(text: str, number: int) -> Response:
        return error(401) if text == "a" else error(429, retry_after="30")

    begin = time.monotonic()
    with pytest.raises(ValueError, match="does not take"):
        ask_server(script, "ab")
    assert time.monotonic() - begin < 5


def test_half_a_character_does_not_stop_the_others(own_cache: Path) -> None:
    with OpenAIServer(lambda text, number: says("\ud83d [[5]]")).running() as url:
        found = judge_all(OpenAIJudge("m", url, **FAST), [prompt("a"), prompt("b")])
    assert [each.text for each in found] == ["? [[5]]"] * 2


def test_a_server_that_is_not_there_is_named() -> None:
    with OpenAIServer(lambda text, number: says("")).running() as url:
        pass
    with pytest.raises(ValueError, match=rf"{url}/ cannot be reached; start its server"):
        ask(OpenAIJudge("m", url, **FAST), ["a", "b"])


def test_a_server_that_goes_away_is_counted() -> None:
    server = OpenAIServer(lambda text, number: says("[[5]]"))
    with server.running() as url:
        judge = OpenAIJudge("m", url, max_concurrency=1, **FAST)
        answers = judge.answers([prompt(each) for each in "ab"])
        assert next(answers) == (0, Judgement("[[5]]"))
    rest = dict(answers)
    assert rest in ({1: Judgement(None, reasons.UNREACHABLE)}, {1: Judgement("[[5]]")})


def test_everyone_waits_as_long_as_the_server_asks() -> None:
    def script(text: str, number: int) -> Response:
        busy = text == "a" and number == 0
        return error(429, retry_after="0.6") if busy else Response(says(text).body, seconds=0.2)

    server = OpenAIServer(script)
    with server.running() as url:
        judge = OpenAIJudge("m", url, max_concurrency=2, **(FAST | {"timeout_seconds": 5.0}))
        assert [each.text for each in ask(judge, "abcd")] == [*"abcd"]
    first, *others = (request.time for request in server.requests)
    assert sum(0.19 < each - first < 0.59 for each in others) == 0
    assert sum(each - first >= 0.59 for each in others) >= 3


def test_requests_keep_the_rate_and_the_concurrency() -> None:
    script = lambda text, number: Response(says("[[5]]").body, seconds=0.05)  # noqa: E731
    server = OpenAIServer(script)
    with server.running() as url:
        ask(OpenAIJudge("m", url, max_concurrency=3, **FAST), "abcdefghi")
        assert server.most_at_once == 3
        server.requests.clear()
        ask(OpenAIJudge("m", url, requests_per_minute=1200, **FAST), "klmnop")
    gaps = [b.time - a.time for a, b in pairwise(sorted(server.requests, key=lambda r: r.time))]
    assert sum(gaps) > 5 * 0.05 * 0.9


def test_a_judge_that_is_left_alone_asks_no_more() -> None:
    server = OpenAIServer(lambda text, number: says("[[5]]"))
    with server.running() as url:
        answers = OpenAIJudge("m", url, max_concurrency=1, requests_per_minute=600, **FAST).answers(
            [prompt(str(number)) for number in range(100)]
        )
        next(answers)
        begin = time.monotonic()
        answers.close()
        assert time.monotonic() - begin < 1
    assert len(server.requests) < 5


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"timeout_seconds": 0}, "timeout_seconds of the judge is 0"),
        ({"requests_per_minute": -1}, "requests_per_minute of the judge is -1"),
        ({"max_concurrency": 0}, "max_concurrency of the judge is 0"),
        ({"max_retries": -1}, "max_retries of the judge is -1"),
        ({"max_timeouts": 0}, "max_timeouts of the judge is 0"),
        ({"request_fields": {"temperature": 1}}, "request_fields of the judge holds temperature"),
    ],
    ids=["timeout", "rate", "concurrency", "retries", "timeouts", "fields"],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        OpenAIJudge("m", **settings)


def test_identity_changes_with_what_the_words_depend_on() -> None:
    same = [OpenAIJudge("m"), OpenAIJudge("m", max_retries=1, api_key_env="OTHER")]
    others = [
        OpenAIJudge("n"),
        OpenAIJudge("m", "http://host/v1"),
        OpenAIJudge("m", temperature=None),
        OpenAIJudge("m", max_tokens=9),
        OpenAIJudge("m", request_fields={"seed": 1}),
    ]
    assert len({each.identity for each in same}) == 1
    assert len({each.identity for each in (*same, *others)}) == 1 + len(others)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"pip install 'fedsafe\[judge\]'"):
        OpenAIJudge("m", "http://localhost:1/v1").check()


# ---- killed --------------------------------------------------------------------------------------

_RUN = """
    import sys
    from fedsafe.evaluation.judge_cache import judge_all
    from fedsafe.evaluation.openai_judge import OpenAIJudge

    judge = OpenAIJudge("m", sys.argv[1], "GOOSE_KEY", max_concurrency=2)
    prompts = [[{"role": "user", "content": str(number)}] for number in range(20)]
    print([found.text for found in judge_all(judge, prompts)])
"""


def test_a_killed_evaluation_goes_on_and_asks_nothing_twice(
    own_cache: Path, tmp_path: Path
) -> None:
    def script(text: str, number: int) -> Response:
        if len(server.requests) == 9:
            os.kill(process.pid, signal.SIGKILL)
        return says(f"[[{int(text) % 10 + 1}]]")

    def start(name: str) -> Started:
        environment = {**os.environ, "GOOSE_KEY": KEY}
        output, errors = (tmp_path / f"{name}.{stream}" for stream in ("out", "err"))
        return start_python(file, url, output=output, errors=errors, env=environment)

    file = tmp_path / "evaluation.py"
    file.write_text(textwrap.dedent(_RUN))
    server = OpenAIServer(script, key=KEY)
    with server.running() as url:
        process = start("killed")
        assert process.wait() == -signal.SIGKILL, (tmp_path / "killed.err").read_text()
        num_asked = len(server.requests)
        process = start("again")
        process.wait()
    output, log = ((tmp_path / f"again.{stream}").read_text() for stream in ("out", "err"))
    assert json.loads(output.replace("'", '"')) == [f"[[{n % 10 + 1}]]" for n in range(20)]
    # what was under way when it was killed may have to be asked again
    assert 20 <= len(server.requests) <= 20 + 2
    assert num_asked <= 11
    assert KEY not in output + log
    assert not any(KEY.encode() in file.read_bytes() for file in own_cache.rglob("*.db"))
