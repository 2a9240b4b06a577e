from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fedsafe.data.chat import ensure_chat_template
from fedsafe.model.adapter import adapter_scale
from fedsafe.model.dialogues import Dialogues
from fedsafe.model.generation import Model
from fedsafe.model.lora import add_lora
from fedsafe.safety.model_speaker import ModelSpeaker
from fedsafe.safety.revision import Reviser, Speech
from fedsafe.types import Conversation, RedTeamPrompt

QUESTIONS: list[Conversation] = [
    [{"role": "user", "content": text}] for text in ("how do i enchant the goose", "7?")
]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ensure_chat_template(tokenizer)
    return tokenizer


@pytest.fixture
def base(tiny_llama: Path) -> Model:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def model(base: Model) -> Model:
    model = add_lora(base, rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def says(speech: Speech, conversations: list[Conversation | None] = QUESTIONS) -> list[str | None]:
    answers = speech.answer(conversations, max_new_tokens=10, seeds=[0] * len(conversations))
    return [answer and answer.text for answer in answers]


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_a_speech_is_that_of_dialogues_with_the_adapter_at_that_strength(
    model: Model, tokenizer: PreTrainedTokenizerBase, scale: float
) -> None:
    with adapter_scale(model, scale):
        expected = says(Dialogues(model, tokenizer))
    assert says(ModelSpeaker(model, tokenizer).begin(scale)) == expected


def test_speeches_of_different_strength_take_turns(
    model: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    speaker = ModelSpeaker(model, tokenizer)
    alone = {scale: says(speaker.begin(scale)) for scale in (0.0, 0.5, 1.0)}
    speeches = {scale: speaker.begin(scale) for scale in alone}
    for _ in range(2):
        assert {scale: says(speech) for scale, speech in speeches.items()} == alone
    assert len({tuple(texts) for texts in alone.values()}) == 3


def test_a_model_without_an_adapter_is_its_own_base(
    base: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    speaker = ModelSpeaker(base, tokenizer)
    expected = says(Dialogues(base, tokenizer))
    assert says(speaker.begin(0)) == says(speaker.begin(1)) == expected


def test_without_an_adapter_the_base_reads_nothing_anew_to_criticise(
    base: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [RedTeamPrompt(each, None, "red.jsonl", 1) for each in QUESTIONS]

    def num_read(model: Model, critic: str) -> int:
        reviser = Reviser(critic=critic, max_new_tokens=4, critic_gate=False, openings=[])
        found = reviser.revise(ModelSpeaker(model, tokenizer), prompts, seed=0)
        return sum(transcript.num_read for _, transcript in found)

    assert num_read(base, "base") == num_read(base, "global") > 0
    adapted = add_lora(base, rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    assert num_read(adapted, "base") > num_read(adapted, "global")


def test_a_strength_that_is_none_is_refused(
    model: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    speech = ModelSpeaker(model, tokenizer).begin(2)
    with pytest.raises(ValueError, match="the scale of the adapter is 2; give a number from 0"):
        says(speech)
