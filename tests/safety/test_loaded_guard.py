"""What is wrong with a guard's checkpoint, format or settings is said when it is loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

from fedsafe.data.chat import default_chat_template
from fedsafe.model.adapter import save_adapter
from fedsafe.model.lora import add_lora, load_base
from fedsafe.safety.guard import UnjudgeableError
from fedsafe.safety.guard_model import GuardModel
from fedsafe.types import Conversation, Turn

Checkpoint = Callable[..., Path]
Tokenizers = Callable[..., Any]

PAIR: Conversation = [
    Turn(role="user", content="how do I tickle a giant"),
    Turn(role="assistant", content="take a feather"),
]
LONG: Conversation = [*PAIR[:1], Turn(role="assistant", content="poke and poke " * 700)]


def judge(*conversations: Conversation, format: str = "llama-guard-3-8b", **settings: Any) -> Any:
    defaults: dict[str, Any] = {"min_label_mass": 0.0, "name_categories": False}
    return GuardModel(format, **defaults | settings).judge(list(conversations) or [PAIR])


# ---- the checkpoint does not fit its format ------------------------------------------------------


def test_a_tokenizer_without_chat_template_is_refused(guard_checkpoint: Checkpoint) -> None:
    folder = str(guard_checkpoint(None))
    message = r"the tokenizer '.*' has no chat template, and a guard of the format llama-guard-3-8b"
    with pytest.raises(ValueError, match=message):
        judge(model=folder)


def test_the_chat_template_that_training_gives_is_no_guards(
    guard_checkpoint: Checkpoint, guard_tokenizer: Tokenizers, tmp_path: Path
) -> None:
    folder = guard_checkpoint(None)
    model = add_lora(load_base(str(folder)), rank=1, alpha=1, dropout=0, target_modules=["q_proj"])
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has no chat template, and a guard of the format llama"):
        judge(adapter=str(tmp_path / "adapter"))
    tokenizer = guard_tokenizer(None)
    tokenizer.chat_template = default_chat_template()
    tokenizer.save_pretrained(tmp_path / "adapter")  # as `fit` leaves it
    with pytest.raises(ValueError, match="has no chat template, and a guard of the format llama"):
        judge(adapter=str(tmp_path / "adapter"))


def test_a_template_that_shows_no_conversation_is_refused(guard_checkpoint: Checkpoint) -> None:
    folder = str(guard_checkpoint("llama_guard_1b"))  # takes parts, and is given text
    with pytest.raises(ValueError, match=r"leaves the judged turn out .* try `content: parts`"):
        judge(model=folder)


def test_labels_of_several_tokens_are_refused(
    guard_checkpoint: Checkpoint, format_of: Callable[..., str]
) -> None:
    question = {"labels": {"harmless": 0, "unsafe": 1}}
    format_ = format_of(user=question, assistant=question)
    message = r"the label 'harmless' of own is \d tokens .*; set label_tokens: first"
    with pytest.raises(ValueError, match=message):
        judge(format=format_, model=str(guard_checkpoint()))


def test_labels_that_are_unlikely_where_they_are_read_are_refused(
    guard_checkpoint: Checkpoint,
) -> None:
    folder = str(guard_checkpoint())
    message = (
        r"labels 'safe', 'unsafe' of llama-guard-3-8b have a probability of 0.0\d+ together .*"
        r"below min_label_mass 0.9; .*check format, model and the tokenizer's chat template"
    )
    with pytest.raises(ValueError, match=message):
        judge(model=folder, min_label_mass=0.9)
    (verdict,) = judge(model=folder, min_label_mass=0.0)
    assert 0 < verdict.unsafe < 0.1


def test_weights_that_are_no_numbers_are_refused(guard_checkpoint: Checkpoint) -> None:
    folder = guard_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[200] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"computes NaN; try dtype float32, and check its weights"):
        judge(model=str(folder))


def test_a_word_whose_weights_are_no_numbers_is_refused_once_it_is_read(
    guard_checkpoint: Checkpoint, guard_tokenizer: Tokenizers
) -> None:
    folder = guard_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data[guard_tokenizer().vocab["Z"]] = torch.nan
    model.save_pretrained(folder)
    assert judge(model=str(folder))[0].unsafe > 0
    with pytest.raises(ValueError, match=r"guard llama-guard-3-8b computes NaN; try dtype float32"):
        judge(PAIR, [Turn(role="user", content="Z")], model=str(folder))


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_label_mass": 1.1}, "min_label_mass is 1.1; give a number from 0 to 1"),
        ({"min_label_mass": -0.1}, "min_label_mass is -0.1; give a number from 0 to 1"),
        ({"window": 0}, "window is 0; give 1 or more tokens"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0; give 1 or more tokens"),
        ({"format": "llama-guard-9"}, "there is no guard format 'llama-guard-9'; shipped are"),
    ],
    ids=["mass-above-1", "mass-below-0", "no-window", "no-batch", "unknown-format"],
)
def test_settings_without_sense_are_refused_before_anything_is_loaded(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GuardModel(**{"format": "llama-guard-3-8b"} | settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(guard_checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="device is cuda and no CUDA device is visible; set devi"):
        judge(model=str(guard_checkpoint()), device="cuda")


def test_categories_that_the_guard_does_not_take_are_refused(guard_checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="llama-guard-3-8b cannot leave categories out"):
        judge(model=str(guard_checkpoint()), excluded_categories=["S1"])


# ---- the window ----------------------------------------------------------------------------------


def test_a_window_beyond_what_the_model_reads_is_refused(guard_checkpoint: Checkpoint) -> None:
    folder = str(guard_checkpoint())
    message = (
        r"window is 2040, and the guard can read 2048 tokens, 29 .* answer's; give at most 2019"
    )
    with pytest.raises(ValueError, match=message):
        judge(model=folder, window=2040)
    assert judge(model=folder, window=2019) == judge(model=folder)


def test_a_long_conversation_is_shortened_and_says_so(guard_checkpoint: Checkpoint) -> None:
    folder = str(guard_checkpoint())
    verdicts = judge(PAIR, LONG, PAIR[:1], LONG, model=folder)
    assert [verdict.shortened for verdict in verdicts] == [False, True, False, True]


def test_a_long_conversation_can_be_an_error_that_says_which(guard_checkpoint: Checkpoint) -> None:
    folder = str(guard_checkpoint())
    with pytest.raises(
        UnjudgeableError, match=r"conversation 2: it makes a prompt of \d+"
    ) as caught:
        judge(PAIR[:1], PAIR, LONG, PAIR, model=folder, too_long="error")
    assert list(caught.value.reasons) == [2]
    assert "poke" not in str(caught.value)


# ---- classifiers ---------------------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path: Path, tiny_llama: Path) -> str:
    """Folder of a random classifier of toxicity that reads 200 tokens."""
    config = BertConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=200,
        id2label={0: "neutral", 1: "toxic"},
    )
    folder = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


def test_a_classifier_judges_what_fits_its_positions(classifier: str) -> None:
    fits, long = judge(PAIR, LONG, format="text-classifier", model=classifier)
    assert 0 < fits.unsafe < 1
    assert (fits.shortened, long.shortened) == (False, True)
    assert (fits.guard, fits.categories) == ("text-classifier", ())
    with pytest.raises(ValueError, match="window is 201, and the guard can read 200 tokens, 0 of"):
        judge(format="text-classifier", model=classifier, window=201)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "a"}, r"text-classifier is a classifier, which takes no adapter \(a\); give"),
        ({"backend": "vllm"}, "is a classifier, which vLLM does not run here; set backend: trans"),
    ],
    ids=["adapter", "vllm"],
)
def test_what_a_classifier_cannot_have_is_refused(
    classifier: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        judge(format="text-classifier", model=classifier, **settings)
