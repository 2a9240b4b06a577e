"""The next token of each row of a batch, from the row's own numbers.

Shapes: B rows, V tokens of the vocabulary, K tokens to draw.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsafe.model.continuation import Seed


def draws(seeds: Sequence[Seed], num_tokens: int) -> Tensor:
    """A uniform number for each token of each row, in [0, 1), shape ``(B, K)``.

    A row's first numbers are the same however many follow.
    """
    rows = [np.random.default_rng(seed).random(num_tokens, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def next_tokens(
    logits_BV: Tensor,  # noqa: N803
    draws_B: Tensor | None,  # noqa: N803
    temperature: float,
) -> Tensor:
    """The likeliest token of each row, or the one where its number falls; shape ``(B,)``.

    -1 where the model computes NaN or infinity: to look here would have a GPU wait.
    A row's token does not depend on the other rows.

    Args:
        logits_BV: What the model says.
        draws_B: A number in [0, 1) for each row; None takes the likeliest.
        temperature: Divides the logits, above 0; without use where there are no draws.
    """
    highest, tokens_B = logits_BV.max(-1)  # noqa: N806
    if draws_B is not None:
        tokens_B = _drawn(logits_BV.float() - highest[:, None], draws_B, temperature)  # noqa: N806
    return tokens_B.where(highest.isfinite(), -1)


def checked(tokens_B: Tensor) -> list[int]:  # noqa: N803
    """The tokens that `next_tokens` gave.

    Raises:
        ValueError: If the model computes NaN or infinity.
    """
    tokens: list[int] = tokens_B.tolist()
    if -1 in tokens:
        raise ValueError(
            "the model computes NaN or infinite logits, so there is no next token; check its "
            "weights and adapter, and try dtype float32"
        )
    return tokens


def _drawn(logits_BV: Tensor, draws_B: Tensor, temperature: float) -> Tensor:  # noqa: N803
    shares_BV = (logits_BV / temperature).softmax(-1)  # noqa: N806
    sums_BV = shares_BV.cumsum(-1)  # noqa: N806
    # rounding leaves the last sum a little beside 1; the draw stays below it in any case
    marks_B1 = (draws_B * sums_BV[:, -1])[:, None]  # noqa: N806
    return torch.searchsorted(sums_BV, marks_B1, right=True)[:, 0]
