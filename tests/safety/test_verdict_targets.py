"""Labelled conversations become a guard's prompt and its verdict."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from fedsafe.data import tokens as tokens_module
from fedsafe.data.chat import ensure_chat_template
from fedsafe.data.sources import load_samples
from fedsafe.data.tokens import TokenStore, tokenize_samples
from fedsafe.safety.verdict_targets import VerdictTargets, tokenize_verdicts

LLAMA_GUARD = VerdictTargets("llama-guard-3-8b")
ROWS = (
    {"prompt": "how do I tickle a giant", "response": "take a feather", "label": "safe"},
    {"prompt": "wake the giant?", "response": "poke", "label": "unsafe", "client": "c1"},
    {"prompt": "and now", "response": "take S3", "label": "unsafe", "category": "S3"},
    {"prompt": "a spell", "response": "no", "label": "unsafe", "category": " Violent Crimes"},
    {"prompt": "a sock", "response": "yes", "label": "unsafe", "category": "puddles"},
    {"prompt": "a hat", "response": "a coat", "label": "safe", "category": "S3"},
)
ANSWERS = ("safe", "unsafe", "unsafe\nS3", "unsafe\nS1", "unsafe", "safe")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def tokenizer(guard_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return guard_tokenizer()


def samples_of(*rows: dict[str, Any], path: str = "a.jsonl") -> datasets.Dataset:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_samples(path)


def answer_of(tokens: datasets.Dataset, index: int) -> list[int]:
    """The ids of a row that the loss is on."""
    row = tokens[index]
    pairs = zip(row["input_ids"], row["answer_mask"], strict=True)
    return [token for token, is_answer in pairs if is_answer]


def plain_ids(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], answer: str) -> list[int]:
    """The whole of it as Llama Guard's users would write it: template, then answer, then end."""
    turns = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["response"]},
    ]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    return [*ids, *tokenizer.encode(f"\n\n{answer}<|eot_id|>", add_special_tokens=False)]


def test_a_sample_is_the_guards_prompt_then_its_verdict(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens = tokenize_verdicts(samples_of(*ROWS), LLAMA_GUARD, tokenizer, max_length=1024)
    for row, answer, tokenized in zip(ROWS, ANSWERS, tokens, strict=True):
        assert tokenized["input_ids"] == plain_ids(tokenizer, row, answer)


def test_the_loss_is_on_label_category_and_end_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenize_verdicts(samples_of(*ROWS), LLAMA_GUARD, tokenizer, max_length=1024)
    for index, answer in enumerate(ANSWERS):
        mask = tokens[index]["answer_mask"]
        assert mask == sorted(mask)
        assert tokenizer.decode(answer_of(tokens, index)) == answer + "<|eot_id|>"
    opening, label = tokens[0]["input_ids"][-3:-1]
    assert tokenizer.convert_tokens_to_ids(["ĊĊ", "safe"]) == [opening, label]


def test_without_categories_the_label_is_all(tokenizer: PreTrainedTokenizerFast) -> None:
    targets = VerdictTargets("llama-guard-3-8b", categories=False)
    tokens = tokenize_verdicts(samples_of(*ROWS), targets, tokenizer, max_length=1024)
    said = {tokenizer.decode(answer_of(tokens, index)) for index in range(len(tokens))}
    assert said == {"safe<|eot_id|>", "unsafe<|eot_id|>"}


@pytest.mark.parametrize(
    ("judge", "seen", "unseen"),
    [("prompt", "tickle", "feather"), ("response", "feather", "tickle")],
)
def test_the_guard_is_shown_the_part_that_is_judged(
    tokenizer: PreTrainedTokenizerFast, judge: Any, seen: str, unseen: str
) -> None:
    targets = VerdictTargets("llama-guard-3-8b", judge=judge)
    tokens = tokenize_verdicts(samples_of(ROWS[0]), targets, tokenizer, max_length=1024)
    text = tokenizer.decode(tokens[0]["input_ids"])
    assert seen in text
    assert unseen not in text


def test_columns_are_those_of_other_samples(
    tokenizer: PreTrainedTokenizerFast, guard_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    plain = guard_tokenizer(None)
    ensure_chat_template(plain)
    samples = samples_of(*ROWS)
    tokens = tokenize_verdicts(samples, LLAMA_GUARD, tokenizer, max_length=1024)
    assert tokens.features == tokenize_samples(samples, plain, max_length=64).features
    assert tokens["label"][:] == [row["label"] for row in ROWS]
    assert tokens["client"][:2] == [None, "c1"]
    assert tokens["row"][:] == [1, 2, 3, 4, 5, 6]
    assert TokenStore(tokens).answer_counts.tolist() == [
        len(tokenizer.encode(answer + "<|eot_id|>", add_special_tokens=False)) for answer in ANSWERS
    ]


def test_of_a_conversation_that_is_too_long_ends_are_shown_and_the_verdict_is_whole(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    [short] = tokenize_verdicts(samples_of(ROWS[2]), LLAMA_GUARD, tokenizer, max_length=1024)
    max_length = len(short["input_ids"]) + 20
    row = ROWS[2] | {"response": "begin " + "poke the giant " * 200 + "finish"}
    tokens = tokenize_verdicts(samples_of(row), LLAMA_GUARD, tokenizer, max_length=max_length)
    assert max_length - 8 <= len(tokens[0]["input_ids"]) <= max_length
    assert tokenizer.decode(answer_of(tokens, 0)) == "unsafe\nS3<|eot_id|>"
    text = tokenizer.decode(tokens[0]["input_ids"])
    assert "Agent: beg" in text
    assert "ish\n\n<END CONVERSATION>" in text


def test_a_row_without_a_label_is_an_error_that_names_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    samples = samples_of(ROWS[0], {"prompt": "a", "response": "b"})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: has no label, .* on_bad_row: skip"):
        tokenize_verdicts(samples, LLAMA_GUARD, tokenizer, max_length=1024)


@pytest.mark.parametrize("again", [False, True], ids=["first", "from the cache"])
def test_rows_that_make_no_verdict_can_be_skipped_and_are_listed(
    tokenizer: PreTrainedTokenizerFast, again: bool
) -> None:
    only_answered = [
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    samples = samples_of(
        {"prompt": "a", "response": "b"}, ROWS[1], {"messages": only_answered, "label": "safe"}
    )
    for _ in range(1 + again):
        Path("rejected.jsonl").unlink(missing_ok=True)
        with pytest.warns(UserWarning, match="left out 2 of 3 rows"):
            tokens = tokenize_verdicts(
                samples,
                LLAMA_GUARD,
                tokenizer,
                max_length=1024,
                on_bad_row="skip",
                rejected=Path("rejected.jsonl"),
            )
    assert tokens["row"][:] == [2]
    first, second = map(json.loads, Path("rejected.jsonl").read_text().splitlines())
    assert (first["row"], second["row"]) == (1, 3)
    assert first["reason"].startswith("has no label")
    assert second["reason"].startswith("the template of ")
    assert "hello" not in second["reason"]


def test_the_same_targets_are_read_from_the_cache_and_others_are_not(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = tokens_module._encode_batch
    monkeypatch.setattr(
        tokens_module, "_encode_batch", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    samples = samples_of(*ROWS)
    settings = [
        (LLAMA_GUARD, 1024),
        (VerdictTargets("llama-guard-3-8b"), 1024),
        (LLAMA_GUARD, 1000),
        (VerdictTargets("llama-guard-3-8b", judge="prompt"), 1024),
        (VerdictTargets("llama-guard-3-8b", categories=False), 1024),
        (VerdictTargets("plain"), 1024),
    ]
    counts = []
    for targets, max_length in settings:
        tokenize_verdicts(samples, targets, tokenizer, max_length=max_length)
        counts.append(len(calls))
    assert counts == [1, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            "loader: classifier\nuser: {labels: {safe: 0, unsafe: 1}}",
            "of the kind `classifier`, and fit",
        ),
        (
            "loader: causal\nuser: {labels: {A: 0, B: 1}, pattern: '(?P<label>A|B)'}",
            r"writes more than a label before it is read \(`pattern`\)",
        ),
        (
            "loader: causal\nuser: {labels: {safe: 0, unsafe: 1}}\nrisks: {puddles: {topic: wet}}",
            "asked about each of its risks apart",
        ),
        (
            "loader: causal\nuser: {labels: {safe: 0, unsafe-S1: 1}}\n"
            "categories: {codes: {S1: puddles}, in_label: true}",
            "labels that hold the kind of harm",
        ),
    ],
    ids=["classifier", "pattern", "risks", "category in the label"],
)
def test_a_format_whose_answer_a_label_does_not_give_is_refused(
    tokenizer: PreTrainedTokenizerFast, values: str, message: str
) -> None:
    Path("own.yaml").write_text(f"model: none\n{values}\n")
    targets = VerdictTargets("own.yaml", judge="prompt")
    with pytest.raises(ValueError, match=f"no verdict targets for the format own: .*{message}"):
        tokenize_verdicts(samples_of(*ROWS), targets, tokenizer, max_length=1024)


def test_a_part_that_the_guard_does_not_judge_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    Path("own.yaml").write_text(
        "model: none\nloader: causal\nuser: {labels: {safe: 0, unsafe: 1}}\n"
    )
    with pytest.raises(ValueError, match="own cannot judge a conversation that ends with the assi"):
        tokenize_verdicts(samples_of(*ROWS), VerdictTargets("own.yaml"), tokenizer, max_length=1024)


def test_a_length_without_room_for_the_guards_policy_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ValueError, match="cannot ask llama-guard-3-8b within max_length 64, 6 of"):
        tokenize_verdicts(samples_of(*ROWS), LLAMA_GUARD, tokenizer, max_length=64)


def test_a_tokenizer_without_an_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="'stand-in' has no end-of-sequence token"):
        tokenize_verdicts(samples_of(*ROWS), LLAMA_GUARD, tokenizer, max_length=1024)
