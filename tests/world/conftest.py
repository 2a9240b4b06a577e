import pytest
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from fedsafe.world.pretraining import pretrain
from fedsafe.world.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def raw_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A base that was hardly trained."""
    return pretrain(tokenizer, seed=0, num_steps=1)
