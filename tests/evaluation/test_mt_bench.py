"""MT-Bench: what is asked and replied, and what it refuses; see `test_mt_bench_judging` too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mt_bench_rows import CATEGORIES, NOBODY, answers, ask_all, questions
from scripted_judge import ScriptedJudge
from scripted_speaker import ScriptedSpeaker
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsafe.data.chat import ensure_chat_template
from fedsafe.evaluation import mt_bench
from fedsafe.evaluation.benchmark import Respondent
from fedsafe.evaluation.judge_prompts import KINDS
from fedsafe.evaluation.local_judge import LocalJudge
from fedsafe.evaluation.mt_bench import MTBench
from fedsafe.evaluation.openai_judge import OpenAIJudge
from fedsafe.evaluation.result_files import write_records
from fedsafe.model.generation import generate_answers
from fedsafe.types import Conversation, Turn

pytestmark = pytest.mark.usefixtures("own_cache")

Write = Callable[..., str]


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch) -> ScriptedSpeaker:
    """A model that repeats the last question; its dialogues are those of the benchmark."""
    scripted = ScriptedSpeaker(lambda scale, talk, seed: f"reply to {talk[-1]['content']}")
    monkeypatch.setattr(mt_bench, "Dialogues", lambda model, tokenizer: scripted.begin(1.0))
    return scripted


# ---- replies -------------------------------------------------------------------------------------


def test_both_turns_are_asked_with_the_first_reply_in_between(
    write: Write, speaker: ScriptedSpeaker
) -> None:
    first = ask_all(MTBench(write()))[0]
    assert first.id == "mt_bench:81"
    assert [(turn["role"], turn["content"]) for turn in first.conversation] == [
        ("user", "writing 1"),
        ("assistant", "reply to writing 1"),
        ("user", "writing 2"),
        ("assistant", "reply to writing 2"),
    ]
    assert first.details["finished"] == [True, True]


def test_the_temperature_is_that_of_the_category(write: Write, speaker: ScriptedSpeaker) -> None:
    ask_all(MTBench(write(), temperatures={"stem": 0.3}, max_new_tokens=7))
    asked = {
        talk[0]["content"].split()[0]: call.temperature
        for call in speaker.calls
        for talk in call.conversations
        if talk is not None
    }
    assert asked == {"writing": 0.7, "math": 0.0, "stem": 0.3, "gardening": 0.7}
    assert {call.max_new_tokens for call in speaker.calls} == {7}


def test_no_more_questions_than_the_batch_size_are_replied_to_at_a_time(
    write: Write, speaker: ScriptedSpeaker
) -> None:
    rows = questions(("writing", "roleplay", "math", "gardening", "writing", "math", "writing"))
    judge = ScriptedJudge(lambda text: "[[4]]")
    batched, whole = (
        ask_all(MTBench(write(rows=rows), judge=judge, batch_size=size, reference_categories=[]))
        for size in (2, 7)
    )
    assert batched == whole
    sizes = [len(call.conversations) for call in speaker.calls]
    assert sizes == [2, 2, 2, 2, 1, 1, 2, 2, 5, 5, 2, 2]  # by temperature, in two turns
    assert judge.num_releases == 2  # all replies of a call are judged together


def test_nothing_is_kept_for_a_turn_after_the_last(write: Write, speaker: ScriptedSpeaker) -> None:
    ask_all(MTBench(write(), temperatures=dict.fromkeys(CATEGORIES, 0.0)))
    assert [call.last for call in speaker.calls] == [False, True]


def test_a_reply_depends_on_its_question_and_turn_not_on_the_batch(
    write: Write, speaker: ScriptedSpeaker
) -> None:
    speaker.say = lambda scale, talk, seed: f"drawn {seed}"
    benchmark = MTBench(write())
    together = ask_all(benchmark)
    apart = [record for n in (3, 1, 0, 2) for record in benchmark.ask(NOBODY, [n])]
    assert sorted(apart, key=lambda record: record.id) == together
    drawn = {turn["content"] for record in together for turn in record.conversation}
    assert len([each for each in drawn if each.startswith("drawn")]) == 8
    assert ask_all(MTBench(write(), seed=1))[0].conversation != together[0].conversation


@pytest.mark.parametrize(
    ("said", "problem"),
    [("<too long>", mt_bench.NO_ROOM), ("<unreadable>", mt_bench.UNREADABLE)],
    ids=["long", "unreadable"],
)
def test_a_question_that_cannot_be_replied_to_is_counted_and_the_others_are_judged(
    write: Write, speaker: ScriptedSpeaker, said: str, problem: str
) -> None:
    speaker.say = lambda scale, talk, seed: said if "stem 2" in talk[-1]["content"] else "a reply"
    judge = ScriptedJudge(lambda text: "[[4]]")
    records = ask_all(MTBench(write(), judge=judge, reference_categories=[]))
    assert [record.problem for record in records] == [None, None, problem, None]
    assert records[2].scores == {"score": None, "score_turn_1": 4.0, "score_turn_2": None}
    assert [turn["role"] for turn in records[2].conversation] == ["user", "assistant", "user"]


def test_replies_are_those_of_generating_turn_by_turn(write: Write, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ensure_chat_template(tokenizer)
    path = write()
    greedy = dict.fromkeys(CATEGORIES, 0.0)
    records = ask_all(
        MTBench(path, temperatures=greedy, max_new_tokens=12),
        Respondent(model, tokenizer, lambda pack: torch.zeros(0)),
    )
    for record in records:
        talk: Conversation = []
        for turn in (0, 2):
            talk.append(record.conversation[turn])
            (reply,) = generate_answers(model, tokenizer, [talk], max_new_tokens=12)
            talk.append(Turn(role="assistant", content=reply.strip()))
        assert record.conversation == talk
    assert len({record.conversation[1]["content"] for record in records}) > 1


def test_without_a_judge_replies_are_kept_and_a_later_run_judges_them(
    write: Write, speaker: ScriptedSpeaker, tmp_path: Path
) -> None:
    records = ask_all(MTBench(write()))
    assert {record.problem for record in records} == {mt_bench.NO_JUDGE}
    assert all(score is None for record in records for score in record.scores.values())
    file = write_records(tmp_path, "test", "mt_bench", records)
    speaker.calls.clear()
    judge = ScriptedJudge(lambda text: "[[8]]")
    later = ask_all(MTBench(write(), judge=judge, replies=str(file), reference_categories=[]))
    assert [each.conversation for each in later] == [each.conversation for each in records]
    assert {each.scores["score"] for each in later} == {8.0}
    assert not speaker.calls


def test_a_question_without_a_reply_in_the_file_is_counted(write: Write) -> None:
    judge = ScriptedJudge(lambda text: "[[8]]")
    file = write("replies.jsonl", answers(81, 83, 84))
    records = ask_all(MTBench(write(), judge=judge, replies=file, reference_categories=[]))
    assert [record.problem for record in records] == [None, mt_bench.NOT_REPLIED, None, None]


def test_a_limit_takes_questions_from_all_over_the_file(write: Write) -> None:
    rows = [{"question_id": n, "category": f"{n // 10}", "turns": ["a", "b"]} for n in range(80)]
    benchmark = MTBench(write(rows=rows), limit=8)
    benchmark.load()
    assert benchmark.categories == [*"01234567"]
    assert MTBench(write(rows=rows), limit=100).num_items == 0  # not read yet


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"mode": "pairwise"}, "mode of mt_bench is pairwise and baseline is None"),
        ({"baseline": "b.jsonl"}, "mode of mt_bench is single and baseline is b.jsonl"),
        ({"limit": 0}, "limit of mt_bench is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens of mt_bench is 0"),
        ({"batch_size": 0}, "batch_size of mt_bench is 0"),
    ],
    ids=["no baseline", "baseline unused", "limit", "tokens", "batch"],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        MTBench("question.jsonl", **settings)


@pytest.mark.parametrize(
    "settings",
    [{"temperatures": {"stemm": 0.0}}, {"reference_categories": ["stemm"]}],
    ids=["temperatures", "references"],
)
def test_a_category_that_no_question_has_is_refused(write: Write, settings: dict[str, Any]) -> None:
    (name,) = settings
    problem = rf"{name} of mt_bench names the category stemm; .* has gardening, math, stem, writing"
    with pytest.raises(ValueError, match=problem):
        MTBench(write(), **settings).load()


@pytest.mark.parametrize("setting", ["references", "replies"])
def test_answers_to_other_questions_are_refused(write: Write, setting: str) -> None:
    benchmark = MTBench(write(), **{setting: write("others.jsonl", answers(1, 2))})
    with pytest.raises(ValueError, match=r"answers none of the 4 questions; its ids are 1, 2"):
        benchmark.load()


def test_a_judge_that_cannot_judge_is_found_before_replies_are_generated(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("GOOSE_KEY", raising=False)
    benchmark = MTBench(
        write(), judge=OpenAIJudge("m", api_key_env="GOOSE_KEY"), reference_categories=[]
    )
    with pytest.raises(ValueError, match=r"\$GOOSE_KEY is not set"):
        benchmark.load()


def test_a_local_judge_judges_and_is_released(write: Write, tiny_llama: Path) -> None:
    judge = LocalJudge(str(tiny_llama), dtype="float32", device="cpu", max_new_tokens=4)
    replies = write("r.jsonl", answers(81, 82, 83, 84))
    short = [
        {"type": mode, "prompt_template": " ".join(f"{{{name}}}" for name in sorted(names))}
        for mode, names in ((kind.mode, kind.required) for kind in KINDS)
    ]
    records = ask_all(
        MTBench(
            write(),
            judge=judge,
            replies=replies,
            prompts=write("prompts.jsonl", short),
            reference_categories=[],
        )
    )
    assert {record.problem for record in records} == {"unparsable rating"}
    assert all(len(word) > 0 for record in records for word in record.details["words"])
    # our own words need more than its 256 positions
    records = ask_all(MTBench(write(), judge=judge, replies=replies, reference_categories=[]))
    assert {record.problem for record in records} == {"too long for the judge"}
    assert "_loaded" not in vars(judge)
