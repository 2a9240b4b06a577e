"""Shared fixtures: an offline environment, the real data sets, two tiny Hugging Face models."""

import atexit
import os
import shutil
import string
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

REPOSITORY = Path(__file__).resolve().parents[1]
STAND_INS = REPOSITORY / "tests" / "stand_ins"
sys.path.append(str(STAND_INS))

# Libraries read these when they are imported, so they are set here and not in a fixture; child
# processes inherit them. The user's caches are neither read nor written.
_caches = tempfile.mkdtemp(prefix="fedsafe-tests-")
atexit.register(shutil.rmtree, _caches, ignore_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=_caches,
    HF_DATASETS_CACHE=f"{_caches}/datasets",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "2")  # tiny tensors only get slower on more threads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: where workers share the files, none has a long one last."""
    marks = ("slow", "distributed", "flower")
    long = {item.path for item in items if any(item.get_closest_marker(mark) for mark in marks)}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets: `$FEDSAFE_DATA`, or `shared/data` beside the repository."""
    folder = Path(os.environ.get("FEDSAFE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; point FEDSAFE_DATA at the folder that holds it")
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that holds what fedsafe caches during one test."""
    monkeypatch.setenv("FEDSAFE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random GPT-2 and a tokenizer: hidden 32, 2 layers, 4 heads, vocabulary 128."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=128,
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_special_token_ids(),
    )
    return _save_tiny(config, tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of the same size, with 2 key/value heads, and the same tokenizer."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128,
        max_position_embeddings=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **_special_token_ids(),
    )
    return _save_tiny(config, tmp_path_factory.mktemp("tiny-llama"))


SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")


def _special_token_ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _save_tiny(config: "PretrainedConfig", folder: Path) -> Path:
    """Write a random model and its tokenizer; torch's global generator is left as it was."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    _save_character_tokenizer(folder)
    return folder


def _save_character_tokenizer(folder: Path) -> None:
    """Write a tokenizer with a token per ASCII character: decoding gives the text back."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = (*SPECIAL_TOKENS, "\n", "\t", *(c for c in string.printable if c.isprintable()))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    ).save_pretrained(folder)
