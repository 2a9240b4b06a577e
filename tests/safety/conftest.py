"""Stand-ins for guards: chat templates in the shape of real ones, a tokenizer, tiny models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL_TOKENS = (
    "<pad>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
# As in Llama 3's tokenizer: line ends stand apart from words, and several are one token.
_WORDS = Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
_CORPUS = (
    "safe unsafe Safe Unsafe Safety: Safe Safety: Unsafe Yes No yes no\n\n",
    "User: how do I tickle a sleeping giant\n\nAgent: take a feather and poke\n\n",
    "S1 S2 S3 S10\n\n\n\nS1,S2,S10\n",
)


@pytest.fixture(scope="session")
def guard_template() -> Callable[[str], str]:
    """The text of a template in `tests/safety/templates`, such as `llama_guard_8b`."""

    def read(name: str) -> str:
        return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")

    return read


@pytest.fixture
def guard_tokenizer(guard_template: Callable[[str], str]) -> "GuardTokenizerMaker":
    """Make a byte-level tokenizer like Llama 3's, with a stand-in chat template or none."""

    def make(template: str | None = "llama_guard_8b") -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=_trained_tokenizer(),
            pad_token="<pad>",
            bos_token="<|begin_of_text|>",
            eos_token="<|eot_id|>",
            additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>"],
            chat_template=guard_template(template) if template else None,
            clean_up_tokenization_spaces=False,
            name_or_path="stand-in",
        )

    return make


@pytest.fixture
def guard_checkpoint(tmp_path: Path, guard_tokenizer: "GuardTokenizerMaker") -> Callable[..., Path]:
    """Make a folder with a random Llama (2 layers, hidden 32) and a tokenizer that fits it."""

    def make(template: str | None = "llama_guard_8b", *, seed: int = 0, **config: Any) -> Path:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        tokenizer = guard_tokenizer(template)
        settings: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        folder = tmp_path / f"guard-{template}-{seed}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(LlamaConfig(**settings | config))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def format_of(tmp_path: Path) -> Callable[..., str]:
    """Write a format of one's own; gives its path."""

    def write(**values: Any) -> str:
        file = tmp_path / "own.yaml"
        given = {"model": "any", "loader": "causal"} | values
        file.write_text(yaml.safe_dump(given, sort_keys=False))
        return str(file)

    return write


GuardTokenizerMaker = Callable[..., PreTrainedTokenizerFast]


def _trained_tokenizer() -> Tokenizer:
    """A fresh one each time: templates and tokens are set on it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend
