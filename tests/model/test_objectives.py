import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedsafe.model import objectives
from fedsafe.model.objectives import (
    dpo_loss,
    dpo_margins,
    frozen_head_nll,
    nll,
    sft_loss,
    sums_per_sample,
)

VOCABULARY, WIDTH = 37, 16


def head(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    return hidden, weight, targets


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and their gradient in float64, from torch's own cross entropy."""
    wide = hidden.detach().double().requires_grad_()
    losses = functional.cross_entropy(wide @ weight.double().T, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses @ scale.double(), wide)
    return losses.detach(), gradient


@pytest.mark.oracle
@pytest.mark.parametrize("block_elements", [VOCABULARY, 3 * VOCABULARY + 5, 2**23])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_losses_and_gradients_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, block_elements: int, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setitem(objectives.BLOCK_ELEMENTS, "cpu", block_elements)
    hidden, weight, targets = head(10, dtype)
    scale = torch.linspace(-1.0, 2.0, 10)
    losses = frozen_head_nll(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(losses @ scale, hidden)
    expected_losses, expected_gradient = exact(hidden, weight, targets, scale)
    assert losses.dtype == torch.float32
    assert gradient.dtype == dtype
    largest = expected_gradient.abs().max().item()
    torch.testing.assert_close(losses.double(), expected_losses, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, atol=tolerance * largest, rtol=tolerance
    )


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    hidden, weight, targets = head(4)
    losses = frozen_head_nll(hidden * 1e3, weight, targets)
    expected, _ = exact(hidden * 1e3, weight, targets, torch.ones(4))
    torch.testing.assert_close(losses.double(), expected, atol=1e-2, rtol=1e-5)


def test_no_tokens_give_no_losses_and_a_zero_gradient() -> None:
    hidden, weight, targets = head(0)
    losses = frozen_head_nll(hidden, weight, targets)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)


def test_without_gradients_the_losses_are_the_same() -> None:
    hidden, weight, targets = head(6)
    with torch.no_grad():
        losses = frozen_head_nll(hidden, weight, targets)
    assert not losses.requires_grad
    assert torch.equal(losses, frozen_head_nll(hidden, weight, targets).detach())


def test_a_head_of_another_type_is_cast_to_that_of_the_hidden_states() -> None:
    hidden, weight, targets = head(6)
    losses = frozen_head_nll(hidden, weight.bfloat16(), targets)
    torch.testing.assert_close(losses, frozen_head_nll(hidden, weight.bfloat16().float(), targets))


def test_losses_of_bfloat16_logits_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 1000, generator=generator).bfloat16()
    targets = torch.arange(5)
    expected = functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(nll(logits, targets).double(), expected, atol=1e-5, rtol=1e-5)


def test_the_loss_is_divided_by_the_tokens_of_the_whole_step() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert sft_loss(losses[:2], normalizer=3) + sft_loss(losses[2:], normalizer=3) == losses.mean()


def test_each_sample_gets_the_sum_of_its_own_tokens() -> None:
    sums = sums_per_sample(torch.tensor([1.0, 2.0, 4.0, 8.0]), [1, 0, 3])
    assert sums.tolist() == [1.0, 0.0, 14.0]
    assert sums_per_sample(torch.zeros(0), [0]).tolist() == [0.0]


def test_a_policy_that_is_the_reference_prefers_nothing() -> None:
    logprobs = torch.tensor([[-3.0, -5.0], [-70.0, -2.0]])
    assert dpo_margins(logprobs, logprobs).tolist() == [0.0, 0.0]
    losses = dpo_loss(logprobs, logprobs, beta=0.3)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_preference_loss_and_its_gradient_are_those_of_the_paper(beta: float) -> None:
    reference = torch.tensor([[-3.0, -5.0], [-1.0, -2.0]])
    logprobs = torch.tensor([[-2.0, -5.5], [-4.0, -1.5]], requires_grad=True)
    assert dpo_margins(logprobs, reference).tolist() == [1.5, -3.5]
    losses = dpo_loss(logprobs, reference, beta=beta)
    expected = [math.log(1 + math.exp(-beta * margin)) for margin in (1.5, -3.5)]
    assert losses.tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    pulls = [beta / (1 + math.exp(beta * margin)) for margin in (1.5, -3.5)]
    assert gradient.flatten().tolist() == pytest.approx(
        [-pulls[0], pulls[0], -pulls[1], pulls[1]], abs=1e-6
    )


def test_a_preference_far_on_either_side_does_not_overflow() -> None:
    logprobs = torch.tensor([[0.0, -1e4], [-1e4, 0.0]], requires_grad=True)
    losses = dpo_loss(logprobs, torch.zeros(2, 2), beta=1.0)
    assert losses.tolist() == [0.0, 1e4]
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert gradient.tolist() == [[0.0, 0.0], [-1.0, 1.0]]
