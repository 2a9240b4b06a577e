"""Training objectives, as pure functions of hidden states and targets.

The output layer is frozen, so its part of the loss can hand the gradient to the hidden states at
once, a block of tokens at a time: the logits of all tokens, ``N x V``, never exist, and are not
kept for the backward pass.

Shapes: N tokens with a loss, D hidden size, V vocabulary, S samples, P pairs of a better and a
worse answer.

References:
    Hsu et al. (2024), Liger Kernel, section 3.2 (fused linear cross entropy).
    https://arxiv.org/abs/2410.10989
    Rafailov et al. (2023), Direct Preference Optimization, section 4.
    https://arxiv.org/abs/2305.18290
    Pang et al. (2024), Iterative Reasoning Preference Optimization, section 2 (the likelihood of
    the better answer in the loss). https://arxiv.org/abs/2404.19733
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsafe.data.packing import PreferenceBatch

BLOCK_ELEMENTS = {"cpu": 2**23, "cuda": 2**28}
"""Logits computed at a time, by device type: they should stay in cache on a CPU and fill a GPU."""


class _FrozenHeadNLL(torch.autograd.Function):
    """Negative log-likelihoods and, in the same pass, their gradients to the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:  # noqa: N803
        keep_gradient = ctx.needs_input_grad[0]
        num_tokens, vocabulary = len(targets_N), weight_VD.shape[0]
        rows = max(1, BLOCK_ELEMENTS.get(hidden_ND.device.type, 2**23) // vocabulary)
        nll_N = torch.empty(num_tokens, dtype=torch.float32, device=hidden_ND.device)  # noqa: N806
        gradient_ND = torch.empty_like(hidden_ND) if keep_gradient else None  # noqa: N806
        logits = hidden_ND.new_empty(min(rows, num_tokens), vocabulary)
        probabilities = torch.empty_like(logits, dtype=torch.float32)
        for begin in range(0, num_tokens, rows):
            block = slice(begin, begin + rows)
            targets = targets_N[block, None]
            size = len(targets)
            block_logits = torch.mm(hidden_ND[block], weight_VD.t(), out=logits[:size])
            probs = torch.softmax(block_logits, 1, dtype=torch.float32, out=probabilities[:size])
            # the largest probability is exp(0) / sum: the log-sum-exp without another pass of exp
            log_z = block_logits.amax(1).float() - probs.amax(1).log()
            nll_N[block] = log_z - block_logits.gather(1, targets)[:, 0].float()
            if gradient_ND is not None:
                probs.scatter_add_(1, targets, probs.new_full((size, 1), -1.0))
                error = probs if probs.dtype == logits.dtype else block_logits.copy_(probs)
                torch.mm(error, weight_VD, out=gradient_ND[block])
        ctx.save_for_backward(gradient_ND)
        return nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors  # noqa: N806
        return gradient_ND * grads[0][:, None].to(gradient_ND.dtype), None, None


def frozen_head_nll(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:  # noqa: N803
    """Negative log-likelihood of each target under ``softmax(hidden @ weight.T)``.

    Args:
        hidden_ND: Hidden states that predict the targets, shape ``(N, D)``; gradients flow to them.
        weight_VD: Frozen output layer, shape ``(V, D)``; gets no gradient.
        targets_N: Token ids, shape ``(N,)``.

    Returns:
        Nats, shape ``(N,)``, float32.
    """
    if len(targets_N) == 0:  # keep the graph, so that a batch without a loss has a (zero) gradient
        return hidden_ND.float().sum(1)
    apply: Callable[..., Tensor] = _FrozenHeadNLL.apply
    return apply(hidden_ND, weight_VD.to(hidden_ND.dtype), targets_N)


def nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:  # noqa: N803
    """Negative log-likelihood of each target in nats, shape ``(N,)``, float32.

    Args:
        logits_NV: Shape ``(N, V)``.
        targets_N: Token ids, shape ``(N,)``.
    """
    return nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def sft_loss(nll_N: Tensor, *, normalizer: int) -> Tensor:  # noqa: N803
    """Supervised fine-tuning: the sum over answer tokens, divided by `normalizer`.

    Args:
        nll_N: Nats of each answer token, shape ``(N,)``.
        normalizer: Answer tokens of the whole optimizer step, >= 1; N where the step is one batch.
    """
    return nll_N.sum() / normalizer


def sums_per_sample(values_N: Tensor, counts: Sequence[int]) -> Tensor:  # noqa: N803
    """Sum the values of each sample, shape ``(S,)``.

    Args:
        values_N: One value a token with a loss, sample after sample, shape ``(N,)``.
        counts: Number of these tokens in each sample; they sum to N.
    """
    return torch.stack([values.sum() for values in values_N.split(list(counts))])


def dpo_margins(logprobs_P2: Tensor, reference_P2: Tensor) -> Tensor:  # noqa: N803
    """How much the policy moved from the worse answer to the better one, nats, shape ``(P,)``.

    ``(log pi(y_c) - log ref(y_c)) - (log pi(y_r) - log ref(y_r))``: the difference of DPO's
    implicit rewards, over beta.

    Args:
        logprobs_P2: Log-probability of the better and the worse answer under the policy, summed
            over its tokens, shape ``(P, 2)``.
        reference_P2: The same under the reference.
    """
    moved = logprobs_P2 - reference_P2
    return moved[:, 0] - moved[:, 1]


def dpo_loss(logprobs_P2: Tensor, reference_P2: Tensor, *, beta: float) -> Tensor:  # noqa: N803
    """Direct preference optimisation: ``-log sigmoid(beta * margin)`` of each pair, shape ``(P,)``.

    Args:
        logprobs_P2: As for `dpo_margins`; gradients flow to them.
        reference_P2: As for `dpo_margins`; a constant.
        beta: Strength of the pull to the reference, > 0.
    """
    return -nn.functional.logsigmoid(beta * dpo_margins(logprobs_P2, reference_P2))


def preference_step(nll_per_token: Tensor, batch: PreferenceBatch) -> dict[str, Tensor]:
    """A batch's part of a step on preferences; see `LoraLM.training_step`.

    Args:
        nll_per_token: Negative log-likelihood of each answer token, nats, shape ``(N,)``.
        batch: The pairs.
    """
    logprobs = -sums_per_sample(nll_per_token, batch.target_counts).view(-1, 2)
    reference = batch.reference.view(-1, 2)
    chosen_nll = -logprobs[:, 0]
    loss = dpo_loss(logprobs, reference, beta=batch.beta).sum() / batch.num_pairs
    if batch.nll_weight > 0:
        loss = loss + batch.nll_weight * sft_loss(chosen_nll, normalizer=batch.num_chosen_tokens)
    return {
        "loss": loss,
        "nll_sum": chosen_nll.detach().sum(),
        "num_preferred": (dpo_margins(logprobs.detach(), reference) > 0).sum(),
    }
