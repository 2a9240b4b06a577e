"""Get a tokenizer: load a model's own, or train a small one on the text at hand."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedsafe.data.chat import ensure_chat_template

_EOS = "<|end|>"
_PAD = "<|pad|>"
_SPECIAL_TOKENS = (_EOS, _PAD)
# Every byte is a token, so that no text is unknown.
_MIN_VOCAB_SIZE = 256 + len(_SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts always give the same tokenizer.

    It has an end-of-sequence and a padding token, needs no unknown token, and carries the default
    chat template.

    Args:
        texts: What to learn the merges from.
        vocab_size: Number of tokens, at least 258; fewer come out where the texts are small.

    Raises:
        ValueError: If the vocabulary cannot hold every byte, or there is no text.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {_MIN_VOCAB_SIZE}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_non_empty(texts), trainer)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=_EOS, pad_token=_PAD, clean_up_tokenization_spaces=False
    )
    ensure_chat_template(tokenizer)
    return tokenizer


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub name or folder; code that comes with it is never run.

    Raises:
        ValueError: If there is none of that name.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load a tokenizer from {name_or_path!r}: give a hub name or a folder with "
            "tokenizer.json as data.tokenizer, or set data.train_tokenizer to train one "
            f"({error})"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _non_empty(texts: Iterable[str]) -> Iterable[str]:
    count = 0
    for text in texts:
        count += bool(text)
        yield text
    if not count:
        raise ValueError("there is no text to train a tokenizer on; give at least one")
