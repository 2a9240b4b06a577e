from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from fedsafe.world.pretraining import pretrain, pretrained_base
from fedsafe.world.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def raw_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A base that was hardly trained."""
    return pretrain(tokenizer, seed=0, num_steps=1)


@pytest.fixture(scope="session")
def base() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The real base: a minute to make, for slow tests only."""
    torch.set_num_threads(1)
    folder: Path = pretrained_base()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder), tokenizer
