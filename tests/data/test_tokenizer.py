import json
from pathlib import Path

import pytest
from warm import run_python

from fedsafe.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["The stork sleeps on the chimney.", "The fox sleeps in the den.", "the the the"]


def test_any_text_comes_back_unchanged() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    for text in ["The fox", "안녕 🦊\n\ttab  two", "", " leading", "don't , do n't ."]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_frequent_words_become_tokens_and_the_size_is_kept() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    assert len(tokenizer) == 280
    assert len(tokenizer(" the sleeps")["input_ids"]) < len(" the sleeps")


def test_the_same_texts_give_the_same_tokenizer_in_any_process(tmp_path: Path) -> None:
    script = tmp_path / "another.py"
    script.write_text(
        "import json, sys; from fedsafe.data.tokenizer import train_tokenizer;"
        "print(train_tokenizer(json.loads(sys.argv[1]), vocab_size=300).backend_tokenizer.to_str())"
    )
    # Every distinct pair below is equally frequent, so the merges hang on how ties are broken.
    texts = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    printed = run_python(script, json.dumps(texts))
    here = train_tokenizer(texts, vocab_size=300)
    assert printed.stdout.strip() == here.backend_tokenizer.to_str()


def test_it_ends_and_pads_and_has_a_chat_template_but_no_unknown_token() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    assert tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id == 1
    assert tokenizer.unk_token is None
    assert tokenizer.bos_token is None
    assert "{% generation %}" in tokenizer.chat_template


def test_a_saved_tokenizer_loads_again(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.eos_token_id == tokenizer.eos_token_id
    text = "The fox sleeps.<|end|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_texts_may_come_from_a_generator() -> None:
    assert len(train_tokenizer((text for text in TEXTS), vocab_size=270)) == 270


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        train_tokenizer(texts, vocab_size=300)


def test_a_vocabulary_too_small_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 257; .* needs at least 258"):
        train_tokenizer(TEXTS, vocab_size=257)


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"from .*nowhere.*: give a hub .* as data.tokenizer, or set data.train_tokenizer",
    ):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_code_that_comes_with_a_tokenizer_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["code.Mine", null]}, "tokenizer_class": "Mine"}'
    )
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path))
    assert not marker.exists()
