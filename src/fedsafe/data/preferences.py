"""Better and worse answers as tokens, and the batches of a server visit."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedsafe.data.packing import Pack, PreferenceBatch, SupervisedBatch
from fedsafe.data.sources import Rejected
from fedsafe.types import PreferencePair


class PreferenceStore:
    """Pairs as tokens; the loss is on the answer, never on the prompt's own earlier answers.

    Args:
        pairs: The pairs.
        tokenizer: With a chat template.
        max_length: Tokens kept of prompt and answer, from their start.

    Attributes:
        usable: Pairs whose chosen answer has a token left, as indices into `pairs`; everything
            below counts in these.
        comparable: Which of the usable ones have a rejected answer that differs from the chosen
            one, also after it was cut, shape ``(len(self),)``.
        left_out: The pairs that are not usable, and why.
    """

    usable: NDArray[np.int64]
    comparable: NDArray[np.bool_]
    left_out: list[Rejected]

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
    ) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        """Number of usable pairs."""
        raise NotImplementedError

    def supervised(self, indices: Sequence[int], *, num_parts: int = 1) -> list[SupervisedBatch]:
        """One optimizer step on chosen answers, in up to `num_parts` packs."""
        raise NotImplementedError

    def preference(
        self,
        indices: Sequence[int],
        *,
        reference: Tensor,
        beta: float,
        nll_weight: float,
        num_parts: int = 1,
    ) -> list[PreferenceBatch]:
        """One optimizer step on comparable pairs, in up to `num_parts` packs.

        Args:
            indices: The step's pairs, all comparable.
            reference: Log-probabilities under the reference adapter, chosen and rejected, of every
                pair, shape ``(len(self), 2)``; rows that are not asked for may be anything.
            beta: See `PreferenceBatch`.
            nll_weight: See `PreferenceBatch`.
            num_parts: Packs to split the step into, for memory.
        """
        raise NotImplementedError

    def both_answers(self, indices: Sequence[int]) -> list[tuple[list[int], Pack]]:
        """Packs of chosen and rejected answers, alternating, for the reference's log-probabilities.

        Returns:
            ``(indices, pack)`` of each pack; every index of `indices` once.
        """
        raise NotImplementedError

    def num_tokens(self, indices: Sequence[int], *, both: bool) -> int:
        """Tokens of these pairs' prompts with their chosen, or with both answers."""
        raise NotImplementedError
