import json
import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast
from warm import run_python

from fedsafe.data import tokens as tokens_module
from fedsafe.data.chat import render_answers, tokenize_rendered
from fedsafe.data.sources import load_samples
from fedsafe.data.tokenizer import load_tokenizer, train_tokenizer
from fedsafe.data.tokens import TokenStore, tokenize_samples


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Where do storks sleep? On chimneys."], vocab_size=280)


def write_samples(num: int = 6, *, path: str = "a.jsonl") -> datasets.Dataset:
    rows = [
        {
            "prompt": f"Question {i}" + " and more" * (i % 4),
            "response": "yes " * (i + 1),
            "client": f"client-{i % 2}",
            "label": "unsafe" if i % 3 == 0 else "safe",
        }
        for i in range(num)
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_samples(path)


def write_one_long(response: str = "yes") -> datasets.Dataset:
    """Two samples; the second one's prompt has more than 100 tokens in any tokenizer here."""
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "long " * 100, "response": response}]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_samples("a.jsonl")


@pytest.fixture
def forbid_tokenizing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and from then on tokenising anything fails the test."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("tokenised although the cache has it")

    return lambda: monkeypatch.setattr(tokens_module, "tokenize_rendered", fail)


def test_tokens_are_those_of_each_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = write_samples()
    tokens = tokenize_samples(samples, tokenizer, max_length=60)
    assert tokens.column_names == [
        "input_ids",
        "answer_mask",
        "client",
        "label",
        "category",
        "source",
        "row",
        "sample",
    ]
    assert tokens.features["input_ids"] == datasets.List(datasets.Value("int32"))
    for sample, row in zip(samples, tokens, strict=True):
        rendered = render_answers(tokenizer, sample["messages"])
        [(ids, mask)] = tokenize_rendered(tokenizer, [rendered], max_length=60)
        assert row["input_ids"] == ids
        assert row["answer_mask"] == [int(each) for each in mask]
        for name in ("client", "label", "category", "source", "row"):
            assert row[name] == sample[name]


def test_a_second_run_does_not_tokenise(
    tokenizer: PreTrainedTokenizerFast, forbid_tokenizing: Any
) -> None:
    first = tokenize_samples(write_samples(), tokenizer, max_length=64)
    forbid_tokenizing()
    again = tokenize_samples(load_samples("a.jsonl"), tokenizer, max_length=64)
    assert first[:] == again[:]
    assert first._fingerprint == again._fingerprint


def test_a_tokenizer_saved_and_loaded_finds_the_same_cache(
    tokenizer: PreTrainedTokenizerFast, folder: Path, forbid_tokenizing: Any
) -> None:
    samples = write_samples()
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenize_samples(samples, load_tokenizer(str(folder / "tokenizer")), max_length=64)
    forbid_tokenizing()
    loaded = load_tokenizer(str(folder / "tokenizer"))
    # A call that pads and cuts leaves its settings in the tokenizer; they do not matter here.
    loaded(["a", "b c d"], padding=True, truncation=True, max_length=2)
    tokenize_samples(samples, loaded, max_length=64)


def test_another_process_finds_the_same_cache(
    tokenizer: PreTrainedTokenizerFast, folder: Path, forbid_tokenizing: Any
) -> None:
    tokenizer.save_pretrained(folder / "tokenizer")
    write_samples()
    script = folder / "another.py"
    script.write_text(
        "import datasets; datasets.config.HF_DATASETS_CACHE = 'cache'\n"
        "from fedsafe.data.sources import load_samples\n"
        "from fedsafe.data.tokenizer import load_tokenizer\n"
        "from fedsafe.data.tokens import tokenize_samples\n"
        "tokenize_samples(load_samples('a.jsonl'), load_tokenizer('tokenizer'), max_length=64)\n"
    )
    assert run_python(script).returncode == 0
    forbid_tokenizing()
    tokenize_samples(
        load_samples("a.jsonl"), load_tokenizer(str(folder / "tokenizer")), max_length=64
    )


@pytest.mark.parametrize("change", ["length", "template", "vocabulary", "eos", "samples", "none"])
def test_whatever_changes_the_tokens_misses_the_cache(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    calls: list[int] = []
    original = tokens_module.tokenize_rendered

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(tokens_module, "tokenize_rendered", counting)
    samples, max_length = write_samples(), 64
    tokenize_samples(samples, tokenizer, max_length=max_length)
    if change == "length":
        max_length = 65
    elif change == "template":
        assert isinstance(tokenizer.chat_template, str)
        tokenizer.chat_template = tokenizer.chat_template.replace("Assistant", "Helper")
    elif change == "vocabulary":
        tokenizer = train_tokenizer(["Quite another text."], vocab_size=280)
    elif change == "eos":
        tokenizer.eos_token = "<|pad|>"
    elif change == "samples":
        samples = samples.select(range(3))
    tokenize_samples(samples, tokenizer, max_length=max_length)
    assert len(calls) == (1 if change == "none" else 2)


@pytest.mark.parametrize("again", [False, True], ids=["first", "from the cache"])
def test_samples_without_an_answer_token_are_left_out_counted_and_listed(
    tokenizer: PreTrainedTokenizerFast, again: bool, forbid_tokenizing: Any
) -> None:
    samples = write_one_long()
    if again:
        with pytest.warns(UserWarning, match="left out 1 of 2"):
            tokenize_samples(samples, tokenizer, max_length=50)
        forbid_tokenizing()
    with pytest.warns(UserWarning, match=r"left out 1 of 2 rows \(all are listed in rejected"):
        tokens = tokenize_samples(
            samples, tokenizer, max_length=50, rejected=Path("rejected.jsonl")
        )
    assert tokens["row"][:] == [1]
    (line,) = Path("rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "source": "a.jsonl",
        "row": 2,
        "reason": "no answer token within max_length 50; raise max_length or shorten the prompt",
    }


def test_an_answer_cut_by_max_length_is_kept_and_no_warning(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    samples = write_samples()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = tokenize_samples(samples, tokenizer, max_length=60)
    assert max(map(len, tokens["input_ids"])) <= 60
    assert len(tokens) == len(samples)


def test_no_sample_left_is_an_error_the_second_time_too(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    samples = write_samples()
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="left out 6 of 6"),
            pytest.raises(ValueError, match="none of 6 samples is left: no answer token within"),
        ):
            tokenize_samples(samples, tokenizer, max_length=2)


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_a_length_without_room_for_prompt_and_answer_is_refused(
    tokenizer: PreTrainedTokenizerFast, max_length: int
) -> None:
    with pytest.raises(ValueError, match=f"max_length is {max_length}; give at least 2"):
        tokenize_samples(write_samples(), tokenizer, max_length=max_length)


@pytest.fixture
def refusing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Its template does not take question 4, in line 5."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'Question 4' in m.content %}{{ raise_exception('no') }}"
        "{% endif %}{{ m.content + eos_token }}{% endfor %}"
    )
    return tokenizer


def test_a_sample_that_the_template_refuses_is_named(refusing: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 5: the chat template refuses .* on_bad_row: skip"
    ):
        tokenize_samples(write_samples(), refusing, max_length=64)


@pytest.mark.parametrize("again", [False, True], ids=["first", "from the cache"])
def test_samples_that_the_template_refuses_can_be_skipped_and_are_listed(
    refusing: PreTrainedTokenizerFast, again: bool, forbid_tokenizing: Any
) -> None:
    samples = write_samples()
    if again:
        with pytest.warns(UserWarning, match="left out 1 of 6"):
            tokenize_samples(samples, refusing, max_length=64, on_bad_row="skip")
        forbid_tokenizing()
    with pytest.warns(UserWarning, match="left out 1 of 6 rows"):
        tokens = tokenize_samples(
            samples, refusing, max_length=64, on_bad_row="skip", rejected=Path("rejected.jsonl")
        )
    assert tokens["row"][:] == [1, 2, 3, 4, 6]
    (line,) = map(json.loads, Path("rejected.jsonl").read_text().splitlines())
    assert (line["source"], line["row"]) == ("a.jsonl", 5)
    assert line["reason"].startswith("the chat template refuses this conversation: no")


def test_refusing_every_sample_is_an_error_when_skipping_too(
    refusing: PreTrainedTokenizerFast,
) -> None:
    refusing.chat_template = "{{ raise_exception('no') }}"
    with (
        pytest.warns(UserWarning, match="left out 6 of 6"),
        pytest.raises(ValueError, match="none of 6 samples is left: the chat template refuses"),
    ):
        tokenize_samples(write_samples(), refusing, max_length=64, on_bad_row="skip")


def test_skipping_before_does_not_hide_the_error(refusing: PreTrainedTokenizerFast) -> None:
    samples = write_samples()
    with pytest.warns(UserWarning, match="left out 1 of 6"):
        tokenize_samples(samples, refusing, max_length=64, on_bad_row="skip")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 5: the chat template refuses"):
        tokenize_samples(samples, refusing, max_length=64)


def test_skipping_tells_a_refused_sample_from_one_that_is_too_long(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.warns(UserWarning, match="line 2: no answer token within max_length 50"):
        tokenize_samples(write_one_long(), tokenizer, max_length=50, on_bad_row="skip")


def test_samples_in_memory_are_cached_too(
    tokenizer: PreTrainedTokenizerFast, forbid_tokenizing: Any
) -> None:
    samples = datasets.Dataset.from_list(write_samples().to_list(), split="train")
    assert not samples.cache_files
    tokenize_samples(samples, tokenizer, max_length=64)
    forbid_tokenizing()
    tokenize_samples(samples, tokenizer, max_length=64)


def make_store(tokenizer: PreTrainedTokenizerFast, num: int = 700) -> TokenStore:
    return TokenStore(tokenize_samples(write_samples(num), tokenizer, max_length=64))


def test_the_store_gives_every_sample_across_its_chunks(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens = tokenize_samples(write_samples(700), tokenizer, max_length=64)
    store = TokenStore(tokens)
    assert len(store._chunks) > 1
    assert len(store) == 700
    for index, row in enumerate(tokens):
        ids, mask = store[index]
        assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)
        assert ids.tolist() == row["input_ids"]
        assert mask.tolist() == [bool(each) for each in row["answer_mask"]]
        assert store.lengths[index] == len(ids)
        assert store.answer_counts[index] == mask.sum()
    assert store.lengths.dtype == store.answer_counts.dtype == np.int32


def test_the_store_copies_no_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenize_samples(write_samples(700), tokenizer, max_length=64)
    store = TokenStore(tokens)
    ids, mask = store[650]
    assert not ids.flags.owndata
    assert not ids.flags.writeable
    assert not mask.flags.writeable
    # The same address as the memory-mapped table's own buffer.
    chunk = tokens.data.column("input_ids").chunk(len(store._chunks) - 1)
    first = chunk.values.to_numpy(zero_copy_only=True)
    assert np.shares_memory(store[len(store) - 1][0], first)


def test_an_access_takes_microseconds(tokenizer: PreTrainedTokenizerFast) -> None:
    store = make_store(tokenizer)
    fastest = []
    for _ in range(5):
        started = time.perf_counter()
        for index in range(len(store)):
            store[index]
        fastest.append((time.perf_counter() - started) / len(store))
    assert min(fastest) < 20e-6


def test_a_pickled_store_is_small_and_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    store = make_store(tokenizer)
    data = pickle.dumps(store)
    assert len(data) < 10_000
    copy = pickle.loads(data)
    assert all((copy[i][0] == store[i][0]).all() for i in range(len(store)))
    assert (copy.answer_counts == store.answer_counts).all()


@pytest.mark.parametrize("rows", [[5, 3, 690], range(100, 400), [7, 7], range(0, 700, 2)])
def test_a_selection_of_rows_has_a_store_too(
    tokenizer: PreTrainedTokenizerFast, rows: list[int]
) -> None:
    tokens = tokenize_samples(write_samples(700), tokenizer, max_length=64)
    store, part = TokenStore(tokens), TokenStore(tokens.select(rows))
    assert len(part) == len(rows)
    for index, row in enumerate(rows):
        assert part[index][0].tolist() == store[row][0].tolist()
        assert part[index][1].tolist() == store[row][1].tolist()
        assert part.answer_counts[index] == store.answer_counts[row]
    assert part.largest_id == max(max(store[row][0]) for row in rows)


def test_the_store_of_no_samples_is_empty(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenize_samples(write_samples(), tokenizer, max_length=64)
    store = TokenStore(tokens.select([]))
    assert len(store) == 0
    assert store.largest_id == -1
    assert store.lengths.shape == store.answer_counts.shape == (0,)


@pytest.mark.parametrize("index", [-1, 6])
def test_a_sample_outside_the_store_is_an_error(
    tokenizer: PreTrainedTokenizerFast, index: int
) -> None:
    with pytest.raises(IndexError, match=f"no sample {index}: the store has samples 0 to 5"):
        make_store(tokenizer, 6)[index]


@pytest.mark.real_data
def test_the_alpaca_file_is_tokenised_and_reported(real_data: Path) -> None:
    samples = load_samples(str(real_data / "benign" / "alpaca_en_demo.json"))
    texts = (turn["content"] for messages in samples["messages"] for turn in messages)
    tokenizer = train_tokenizer(texts, vocab_size=2_000)
    with pytest.warns(UserWarning, match=r"left out \d+ of 999 rows"):
        store = TokenStore(tokenize_samples(samples, tokenizer, max_length=64))
    assert 900 < len(store) < 999
    assert store.lengths.max() == 64
    assert store.answer_counts.min() >= 1
    ids, mask = TokenStore(tokenize_samples(samples, tokenizer, max_length=1_024))[0]
    assert tokenizer.decode(ids[mask]) == " " + samples[0]["messages"][1]["content"] + "<|end|>"
