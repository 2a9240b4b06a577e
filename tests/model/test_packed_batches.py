"""A packed batch against the same samples padded, through plain transformers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedsafe.data.packing import Pack, pack
from fedsafe.model.module import LoraLM

ModuleMaker = Callable[..., LoraLM]
Samples = list[tuple[np.ndarray, np.ndarray]]


def padded_nll(module: LoraLM, samples: Samples, *, attention: str = "sdpa") -> Tensor:
    """Nats of every answer token, sample after sample; the way most people train."""
    longest = max(len(ids) for ids, _ in samples)
    input_ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    mask = torch.zeros_like(input_ids)
    for row, (ids, answers) in enumerate(samples):
        tokens = torch.from_numpy(ids).long()
        input_ids[row, : len(ids)] = tokens
        mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.where(torch.from_numpy(answers), tokens, -100)
    module.peft_model.get_base_model().set_attn_implementation(attention)
    logits = module.peft_model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    losses = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
    )
    return losses[labels[:, 1:] != -100]


def gradients(module: LoraLM, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, module.flat_adapter().parameters))


def assert_same_loss_and_gradients(
    module: LoraLM, reference: LoraLM, packed: Pack, expected: Tensor
) -> None:
    actual = module(packed)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(0.5, 2.0, len(actual))  # a uniform sum would hide mixed-up tokens
    for mine, theirs in zip(
        gradients(module, actual @ weights), gradients(reference, expected @ weights), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "granite", "cohere", "phi"])
def test_packed_loss_and_gradients_are_those_of_a_padded_batch(
    make_module: ModuleMaker, samples: Samples, packed: Pack, family: str
) -> None:
    module, reference = make_module(family), make_module(family)
    expected = padded_nll(reference, samples)
    assert_same_loss_and_gradients(module, reference, packed, expected)


@pytest.mark.oracle
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_attention_of_transformers_gives_the_same(
    make_module: ModuleMaker, samples: Samples, packed: Pack, family: str, attention: str
) -> None:
    module, reference = make_module(family, attention=attention), make_module(family)
    expected = padded_nll(reference, samples)
    assert_same_loss_and_gradients(module, reference, packed, expected)


@pytest.mark.oracle
def test_a_model_that_caps_its_scores_trains_with_eager_attention(
    make_module: ModuleMaker, samples: Samples, packed: Pack
) -> None:
    module, reference = (make_module("gemma2", attention="eager") for _ in range(2))
    expected = padded_nll(reference, samples, attention="eager")
    assert_same_loss_and_gradients(module, reference, packed, expected)


@pytest.mark.parametrize(
    ("family", "plain"),
    [("gpt2", True), ("llama", True), ("granite", False), ("cohere", False), ("phi", False)],
)
def test_the_fast_output_layer_serves_exactly_the_models_that_it_fits(
    make_module: ModuleMaker, packed: Pack, family: str, plain: bool
) -> None:
    module = make_module(family)
    module(packed)
    assert module._head_is_plain == plain


def test_the_fast_output_layer_is_not_used_where_it_is_trained(
    make_module: ModuleMaker, packed: Pack
) -> None:
    module = make_module("llama", target_modules=["q_proj", "lm_head"])
    module(packed).sum().backward()
    assert not module._head_is_plain
    assert all(gradient.abs().sum() > 0 for gradient in module.flat_adapter().gradients())


def test_samples_do_not_see_each_other(make_module: ModuleMaker, samples: Samples) -> None:
    module = make_module("llama")
    together = module(pack(samples))
    apart = torch.cat([module(pack([sample])) for sample in samples])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "attention", "message"),
    [
        ("gemma2", "packed", "no softcap, which Gemma2Attention asks for; set model.attention to"),
        ("bloom", "packed", "BloomForCausalLM lets packed samples see each other"),
        ("bloom", "eager", "BloomForCausalLM lets packed samples see each other"),
    ],
)
def test_a_model_that_would_mix_samples_or_lose_its_caps_is_refused(
    make_module: ModuleMaker, packed: Pack, family: str, attention: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(family, attention=attention)(packed)


def test_a_key_value_cache_in_use_would_have_been_noticed(
    make_module: ModuleMaker, packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module("llama", attention="sdpa")
    inputs = module._inputs
    monkeypatch.setattr(module, "_inputs", lambda batch: inputs(batch) | {"use_cache": True})
    with pytest.raises(ValueError, match="lets packed samples see each other with attention 'sd"):
        module(packed)


@pytest.mark.parametrize("family", ["gpt2", "llama", "granite"])
def test_a_batch_without_samples_has_zero_loss_and_gradients(
    make_module: ModuleMaker, family: str
) -> None:
    module = make_module(family)
    nll = module(pack([]))
    assert nll.shape == (0,)
    assert all(not gradient.any() for gradient in gradients(module, nll.sum()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradient_checkpointing_changes_nothing(
    make_module: ModuleMaker, packed: Pack, family: str
) -> None:
    plain = make_module(family, lora_dropout=0.3)
    saving = make_module(family, lora_dropout=0.3, gradient_checkpointing=True)
    losses = []
    for module in (plain, saving):
        torch.manual_seed(0)
        losses.append(module(packed).sum())
    assert torch.equal(*losses)
    for mine, theirs in zip(gradients(plain, losses[0]), gradients(saving, losses[1]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_gradient_checkpointing_does_recompute(make_module: ModuleMaker, packed: Pack) -> None:
    module = make_module("llama", gradient_checkpointing=True)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    layer = module.peft_model.get_base_model().model.layers[0].self_attn
    module(pack([]))  # the probes of the first call
    layer.register_forward_hook(count)
    module(packed).sum().backward()
    assert calls == 2
