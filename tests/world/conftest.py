import os

import pytest
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
def base(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The real base, for slow tests only: a minute to make unless `$FEDSAFE_CACHE` has it."""
    cache = None if "FEDSAFE_CACHE" in os.environ else tmp_path_factory.mktemp("cache")
    folder = pretrained_base(cache)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder), tokenizer
