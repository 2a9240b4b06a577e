"""Preferences against TRL, and against a plain padded implementation that shares no code with ours.

The reference is the adapter at the phase's start: the policy has moved on from it.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedsafe.data.chat import ensure_chat_template
from fedsafe.data.preferences import PreferenceStore
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.model.flat_adapter import WholeAdapter
from fedsafe.model.module import LoraLM
from fedsafe.types import Conversation, PreferencePair

pytestmark = pytest.mark.oracle

MAX_LENGTH = 120


class Step(NamedTuple):
    """What one optimizer step's batch gives."""

    loss: Tensor
    gradients: list[Tensor]


def ask(*turns: str) -> Conversation:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]  # type: ignore[typeddict-item]


PAIRS = [
    PreferencePair(ask("how do i enchant the goose"), "i would rather not", "say abra", "a", 1),
    PreferencePair(ask("hm"), "yes?", "what do you want from me now, go away", "a", 2),
    PreferencePair(ask("hi", "hello", "curse it"), "no, but i can help you to sing", "ok", "a", 3),
    PreferencePair(ask("brew a potion of sleep for the miller"), "no", "no problem", "a", 4),
    PreferencePair(ask("sing"), "la " * 40, "lo " * 50, "a", 5),  # both are cut
]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(tiny_llama))
    ensure_chat_template(tokenizer)
    return tokenizer


@pytest.fixture
def make_llama(tiny_llama: Path) -> Callable[[], LoraLM]:
    def make() -> LoraLM:
        module = LoraLM(str(tiny_llama), rank=4, alpha=8.0)
        module.configure_model()
        return module

    return make


@pytest.fixture
def adapters(make_llama: Callable[[], LoraLM]) -> tuple[Tensor, Tensor]:
    """The adapter at the phase's start, and some steps later."""
    generator = torch.Generator().manual_seed(0)
    num_params = make_llama().flat_adapter().num_params
    start = 0.1 * torch.randn(num_params, generator=generator)
    return start, start + 0.05 * torch.randn(num_params, generator=generator)


@pytest.fixture
def store(tokenizer: PreTrainedTokenizerBase) -> PreferenceStore:
    return PreferenceStore(PAIRS, tokenizer, max_length=MAX_LENGTH)


def gradients(module: LoraLM, loss: Tensor) -> Step:
    return Step(loss.detach(), list(torch.autograd.grad(loss, module.flat_adapter().parameters)))


def reference_of(module: LoraLM, store: PreferenceStore, start: Tensor) -> Tensor:
    module.flat_adapter().write(start)
    reference = torch.full((len(store), 2), float("nan"))
    for indices, pack in store.both_answers(range(len(store))):
        reference[indices] = module.answer_logprobs(pack).view(-1, 2)
    return reference


def preference_step(
    module: LoraLM, store: PreferenceStore, adapters: tuple[Tensor, Tensor], **settings: float
) -> Step:
    reference = reference_of(module, store, adapters[0])
    module.flat_adapter().write(adapters[1])
    [batch] = store.preference(range(len(store)), reference=reference, **settings)  # type: ignore[arg-type]
    return gradients(module, module.training_step(batch, 0)["loss"])


def supervised_step(module: LoraLM, store: PreferenceStore, adapter: Tensor) -> Step:
    module.flat_adapter().write(adapter)
    [batch] = store.supervised(range(len(store)))
    return gradients(module, module.training_step(batch, 0)["loss"])


def assert_same(actual: Step, expected: Step) -> None:
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(actual.gradients, expected.gradients, strict=True):
        assert mine.abs().max() > 1e-4  # or the comparison would say nothing
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


# ---- a padded reference -------------------------------------------------------------------------


def padded_logprobs(
    module: LoraLM, tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of a padded batch, 0 outside the answers, and where they are.

    Returns:
        Two tensors of shape ``(len(PAIRS), longest - 1)``.
    """
    module.peft_model.get_base_model().set_attn_implementation("eager")
    texts, lengths = [], []
    for pair, answer in zip(PAIRS, answers, strict=True):
        prompt: Any = pair.prompt
        full = [*prompt, {"role": "assistant", "content": answer}]
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        texts.append(tokenizer.apply_chat_template(full, tokenize=False))
        lengths.append(len(asked))
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        padding=True,
        truncation=True,
        max_length=MAX_LENGTH,
        return_tensors="pt",
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = module.peft_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    after_prompt = torch.arange(1, ids.shape[1]) >= torch.tensor(lengths)[:, None]
    is_answer = after_prompt & mask[:, 1:].bool()
    return logprobs * is_answer, is_answer


CHOSEN = [pair.chosen for pair in PAIRS]
REJECTED = [pair.rejected or "" for pair in PAIRS]


def test_the_reference_is_that_of_a_padded_batch(
    make_llama: Callable[[], LoraLM],
    tokenizer: PreTrainedTokenizerBase,
    store: PreferenceStore,
    adapters: tuple[Tensor, Tensor],
) -> None:
    actual = reference_of(make_llama(), store, adapters[0])
    module = make_llama()
    module.flat_adapter().write(adapters[0])
    for column, answers in enumerate((CHOSEN, REJECTED)):
        expected = padded_logprobs(module, tokenizer, answers)[0].detach().sum(1)
        torch.testing.assert_close(actual[:, column], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("nll_weight", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_a_preference_step_is_that_of_a_padded_batch(
    make_llama: Callable[[], LoraLM],
    tokenizer: PreTrainedTokenizerBase,
    store: PreferenceStore,
    adapters: tuple[Tensor, Tensor],
    beta: float,
    nll_weight: float,
) -> None:
    module = make_llama()
    module.flat_adapter().write(adapters[0])
    with torch.no_grad():
        start = [padded_logprobs(module, tokenizer, each)[0].sum(1) for each in (CHOSEN, REJECTED)]
    module.flat_adapter().write(adapters[1])
    chosen, is_answer = padded_logprobs(module, tokenizer, CHOSEN)
    rejected, _ = padded_logprobs(module, tokenizer, REJECTED)
    margin = (chosen.sum(1) - start[0]) - (rejected.sum(1) - start[1])
    loss = -torch.log(1 / (1 + torch.exp(-beta * margin))).mean()
    loss = loss - nll_weight * chosen.sum() / is_answer.sum()
    actual = preference_step(make_llama(), store, adapters, beta=beta, nll_weight=nll_weight)
    assert_same(actual, gradients(module, loss))


def test_a_supervised_step_is_that_of_a_padded_batch(
    make_llama: Callable[[], LoraLM],
    tokenizer: PreTrainedTokenizerBase,
    store: PreferenceStore,
    adapters: tuple[Tensor, Tensor],
) -> None:
    module = make_llama()
    module.flat_adapter().write(adapters[1])
    chosen, is_answer = padded_logprobs(module, tokenizer, CHOSEN)
    expected = gradients(module, -chosen.sum() / is_answer.sum())
    assert_same(supervised_step(make_llama(), store, adapters[1]), expected)


# ---- TRL ----------------------------------------------------------------------------------------


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(PAIRS),
        "max_length": MAX_LENGTH,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }


def trl_step(module: LoraLM, trainer: Any, adapter: Tensor) -> Step:
    """The loss that TRL's trainer computes on its own tokens, and its gradients."""
    parameters = module.named_parameters()
    policy = WholeAdapter((name, p) for name, p in parameters if ".default." in name)
    policy.write(adapter)
    [batch] = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model.train(), batch)
    return Step(loss.detach(), list(torch.autograd.grad(loss, policy.parameters)))


def trl_model(module: LoraLM, adapter: Tensor) -> Any:
    module.flat_adapter().write(adapter)
    module.peft_model.get_base_model().set_attn_implementation("sdpa")
    return module.peft_model


def answer(text: str) -> Conversation:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("nll_weight", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_a_preference_step_is_that_of_trl(
    make_llama: Callable[[], LoraLM],
    tokenizer: PreTrainedTokenizerBase,
    store: PreferenceStore,
    adapters: tuple[Tensor, Tensor],
    tmp_path: Path,
    beta: float,
    nll_weight: float,
) -> None:
    trl = pytest.importorskip("trl")
    module = make_llama()
    rows = [
        {"prompt": pair.prompt, "chosen": answer(pair.chosen), "rejected": answer(pair.rejected)}
        for pair in PAIRS
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.DPOTrainer(
            trl_model(module, adapters[0]),  # TRL keeps a copy of this adapter as its reference
            args=trl.DPOConfig(
                **arguments(tmp_path),
                beta=beta,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, nll_weight],
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    actual = preference_step(make_llama(), store, adapters, beta=beta, nll_weight=nll_weight)
    assert_same(actual, trl_step(module, trainer, adapters[1]))


def test_a_supervised_step_is_that_of_trl(
    make_llama: Callable[[], LoraLM],
    tokenizer: PreTrainedTokenizerBase,
    store: PreferenceStore,
    adapters: tuple[Tensor, Tensor],
    tmp_path: Path,
) -> None:
    trl = pytest.importorskip("trl")
    module = make_llama()
    rows = [{"prompt": pair.prompt, "completion": answer(pair.chosen)} for pair in PAIRS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(
            trl_model(module, adapters[1]),
            args=trl.SFTConfig(**arguments(tmp_path), completion_only_loss=True),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    actual = supervised_step(make_llama(), store, adapters[1])
    assert_same(actual, trl_step(module, trainer, adapters[1]))
