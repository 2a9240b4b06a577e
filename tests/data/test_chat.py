import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from fedsafe.data.chat import (
    default_chat_template,
    ensure_chat_template,
    render,
    render_answers,
    tokenize_rendered,
)
from fedsafe.data.tokenizer import train_tokenizer
from fedsafe.types import Conversation, TokenizedConversation, Turn

# Written for these tests in the manner of well-known families, each with and without tags.
TAGGED_TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start|>' + m['role'] + '<|stop|>\n\n' }}"
        "{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] | trim + '<|eot|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<|eot|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|eot|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m['content'] + '<|eot|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system turn here') }}"
        "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    ),
    "default": default_chat_template(),
}

CONVERSATIONS: dict[str, Conversation] = {
    "one exchange": [
        Turn(role="user", content="Where do storks sleep?"),
        Turn(role="assistant", content="On chimneys, mostly."),
    ],
    "three exchanges": [
        Turn(role="user", content="hello"),
        Turn(role="assistant", content="Hi! "),
        Turn(role="user", content="Say it twice"),
        Turn(role="assistant", content="hello\nhello"),
        Turn(role="user", content="User: hello\nAssistant: hello"),
        Turn(role="assistant", content="You said hello."),
    ],
    "two answers in a row": [
        Turn(role="user", content="knock"),
        Turn(role="assistant", content="Who is there?"),
        Turn(role="assistant", content="Nobody."),
    ],
    "letters beyond ASCII": [
        Turn(role="user", content="안녕 🦊 naïve"),
        Turn(role="assistant", content="🦊🦊 übermäßig — 좋아요"),
    ],
}


def without_tags(template: str) -> str:
    return re.sub(r"\{%-? (end)?generation -?%\}", "", template)


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that leaves leading spaces out of its offsets, as GPT-2's does."""
    texts = [turn["content"] for each in CONVERSATIONS.values() for turn in each] * 3
    tokenizer = train_tokenizer(texts, vocab_size=400)
    state = tokenizer.backend_tokenizer.to_str()
    backend = Tokenizer.from_str(state.replace('"trim_offsets":false', '"trim_offsets":true'))
    assert backend.to_str() != state
    return fast(backend)


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of SentencePiece: `▁` before words, a token per character."""
    text = "".join(turn["content"] for each in CONVERSATIONS.values() for turn in each)
    alphabet = sorted({*text, *map(chr, range(32, 127)), "\n", "▁"})
    words = ["▁hello", "▁On", "▁H", "▁[/INST]"]
    scores = [(token, -1.0) for token in ["<unk>", *alphabet, *words]]
    backend = Tokenizer(models.Unigram(scores, unk_id=0))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Metaspace()
    return fast(backend)


@pytest.fixture(scope="module")
def word_level() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that forgets white space."""
    text = " ".join(turn["content"] for each in CONVERSATIONS.values() for turn in each)
    text += " User Assistant user assistant : [ ] / INST"
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", text)))
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(backend)


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|start|>", "<|stop|>", "<|eot|>"],
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(params=["byte_level", "metaspace", "word_level"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, a token per character, that knows no offsets."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(eos_token="~", **kwargs)

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(index): index for index in range(128)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def tokenize_conversation(
    tokenizer: Any, messages: Conversation, *, max_length: int
) -> TokenizedConversation:
    rendered = render_answers(tokenizer, messages)
    return tokenize_rendered(tokenizer, [rendered], max_length=max_length)[0]


def answers(tokenizer: Any, messages: Conversation, *, max_length: int = 10_000) -> list[str]:
    """Decoded text of each run of marked tokens."""
    ids, mask = tokenize_conversation(tokenizer, messages, max_length=max_length)
    runs: list[list[int]] = []
    for index, (token, marked) in enumerate(zip(ids, mask, strict=True)):
        if marked and (index == 0 or not mask[index - 1]):
            runs.append([])
        if marked:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", TAGGED_TEMPLATES)
def test_a_template_with_and_without_tags_marks_the_same_tokens(
    tokenizer: PreTrainedTokenizerFast, family: str, conversation: str
) -> None:
    messages = CONVERSATIONS[conversation]
    tokenizer.chat_template = TAGGED_TEMPLATES[family]
    tagged = tokenize_conversation(tokenizer, messages, max_length=1_000)
    tokenizer.chat_template = without_tags(TAGGED_TEMPLATES[family])
    untagged = tokenize_conversation(tokenizer, messages, max_length=1_000)
    assert "generation %}" not in tokenizer.chat_template
    assert tagged == untagged
    assert any(tagged.answer_mask)
    assert not all(tagged.answer_mask)


@pytest.mark.parametrize("family", TAGGED_TEMPLATES)
def test_the_ids_are_those_of_the_rendered_text(
    tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    tokenizer.chat_template = TAGGED_TEMPLATES[family]
    messages = CONVERSATIONS["three exchanges"]
    text = render(tokenizer, messages, add_generation_prompt=False)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenize_conversation(tokenizer, messages, max_length=1_000).input_ids == expected


@pytest.mark.parametrize(
    ("family", "end"),
    [("llama3", "<|eot|>"), ("chatml", "<|eot|>"), ("mistral", "</s>"), ("default", "</s>")],
)
def test_answers_hold_their_end_of_turn_token_and_nothing_after_it(
    byte_level: PreTrainedTokenizerFast, family: str, end: str
) -> None:
    byte_level.chat_template = without_tags(TAGGED_TEMPLATES[family])
    texts = answers(byte_level, CONVERSATIONS["three exchanges"])
    said = ["Hi!", "hello\nhello", "You said hello."]
    assert [text.replace(end, "").strip() for text in texts] == said
    assert all(text.endswith(end) for text in texts)


def test_an_answer_that_the_user_wrote_before_is_not_marked(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    byte_level.chat_template = default_chat_template()
    texts = answers(byte_level, CONVERSATIONS["three exchanges"])
    assert texts == [" Hi! </s>", " hello\nhello</s>", " You said hello.</s>"]


def test_every_byte_of_a_split_character_is_marked(byte_level: PreTrainedTokenizerFast) -> None:
    byte_level.chat_template = default_chat_template()
    assert answers(byte_level, CONVERSATIONS["letters beyond ASCII"]) == [
        " 🦊🦊 übermäßig — 좋아요</s>"
    ]


def test_a_token_that_straddles_the_start_of_an_answer_counts_as_answer() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "A:yes": 1, "Q:go": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = fast(backend)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('A:' if m.role == 'assistant' else 'Q:') + m.content + ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    messages = [Turn(role="user", content="go"), Turn(role="assistant", content="yes")]
    assert tokenize_conversation(tokenizer, messages, max_length=9) == ([2, 1], [False, True])


def test_truncation_keeps_the_first_tokens_and_their_mask(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = default_chat_template()
    messages = CONVERSATIONS["three exchanges"]
    whole = tokenize_conversation(tokenizer, messages, max_length=1_000)
    for length in (1, 5, 12):
        short = tokenize_conversation(tokenizer, messages, max_length=length)
        assert short == (whole.input_ids[:length], whole.answer_mask[:length])


def test_a_text_longer_than_the_model_is_no_warning(
    byte_level: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    byte_level.chat_template = default_chat_template()
    messages = [Turn(role="user", content="a " * 500), Turn(role="assistant", content="b " * 500)]
    length = byte_level.model_max_length
    byte_level.model_max_length = 16
    try:
        assert len(tokenize_conversation(byte_level, messages, max_length=1_500).input_ids) > 900
    finally:
        byte_level.model_max_length = length
    assert not caplog.records


def test_a_slow_tokenizer_marks_the_same_text() -> None:
    tokenizer = SlowTokenizer()
    ensure_chat_template(tokenizer)
    messages = [
        Turn(role="user", content="hello"),
        Turn(role="assistant", content="Hi!"),
        Turn(role="user", content="again"),
        Turn(role="assistant", content="Hi."),
    ]
    ids, mask = tokenize_conversation(tokenizer, messages, max_length=1_000)
    assert tokenizer.decode(ids) == render(tokenizer, messages, add_generation_prompt=False)
    marked = "".join(chr(token) for token, is_answer in zip(ids, mask, strict=True) if is_answer)
    assert marked == " Hi!~ Hi.~"


def test_the_default_template_renders_the_documented_format(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    byte_level.chat_template = None
    byte_level.bos_token = None
    ensure_chat_template(byte_level)
    messages = [
        Turn(role="system", content="Be brief."),
        Turn(role="user", content="Hello\nthere"),
        Turn(role="assistant", content="Hi."),
        Turn(role="user", content="Bye"),
    ]
    text = "System: Be brief.\nUser: Hello\nthere\nAssistant: Hi.</s>\nUser: Bye"
    assert render(byte_level, messages, add_generation_prompt=False) == text
    assert render(byte_level, messages, add_generation_prompt=True) == text + "\nAssistant:"
    byte_level.bos_token = "<s>"
    assert render(byte_level, messages, add_generation_prompt=False) == "<s>" + text


def test_generation_starts_from_the_tokens_that_training_saw(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    byte_level.chat_template = default_chat_template()
    messages = CONVERSATIONS["one exchange"]
    ids, mask = tokenize_conversation(byte_level, messages, max_length=1_000)
    prompt = render(byte_level, messages[:1], add_generation_prompt=True)
    assert ids[: mask.index(True)] == byte_level(prompt, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_with_a_template_keeps_it(byte_level: PreTrainedTokenizerFast) -> None:
    byte_level.chat_template = TAGGED_TEMPLATES["chatml"]
    ensure_chat_template(byte_level)
    assert byte_level.chat_template == TAGGED_TEMPLATES["chatml"]


def test_a_model_without_a_template_is_given_one(tiny_gpt2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    assert tokenizer.chat_template is None
    ensure_chat_template(tokenizer)
    assert answers(tokenizer, CONVERSATIONS["one exchange"]) == [" On chimneys, mostly.</s>"]


def test_neither_template_nor_eos_token_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="neither a chat template nor an end-of-sequence token"):
        ensure_chat_template(tokenizer)


@pytest.mark.parametrize("family", ["chatml", "default"])
def test_a_template_that_drops_answers_is_refused(
    byte_level: PreTrainedTokenizerFast, family: str
) -> None:
    template = TAGGED_TEMPLATES[family].replace("content", "text")
    byte_level.chat_template = template.replace("'' + ", "").replace("m['text']", "''")
    if family == "default":
        byte_level.chat_template = template.replace("message.text", "''")
    with pytest.raises(ValueError, match="drops or changes the answer in turn 1"):
        tokenize_conversation(byte_level, CONVERSATIONS["one exchange"], max_length=100)


def test_a_template_that_cuts_an_earlier_answer_is_refused(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    byte_level.chat_template = (
        "{% for m in messages %}{{ m.role + ':' }}"
        "{% if m.role == 'assistant' and not loop.last %}…{% else %}{{ m.content }}{% endif %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert answers(byte_level, CONVERSATIONS["one exchange"]) == ["On chimneys, mostly.</s>"]
    with pytest.raises(ValueError, match=r"turn 1 .* differently .* put \{% generation %\}"):
        tokenize_conversation(byte_level, CONVERSATIONS["three exchanges"], max_length=100)


def test_a_conversation_that_the_template_refuses_is_an_error(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    byte_level.chat_template = TAGGED_TEMPLATES["mistral"]
    messages = [Turn(role="system", content="Be brief."), *CONVERSATIONS["one exchange"]]
    with pytest.raises(ValueError, match="refuses this conversation: no system turn here"):
        tokenize_conversation(byte_level, messages, max_length=100)
