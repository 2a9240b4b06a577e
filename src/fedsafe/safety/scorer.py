"""What a guard's verdicts are made from: probabilities of its labels, or the words it answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class Scorer(ABC):
    """A loaded checkpoint that is asked prompts of token ids."""

    exclusive: bool = True
    """Whether one label excludes the others, so that their probabilities add up to at most 1."""

    @abstractmethod
    def label_probabilities(
        self, prompts: Sequence[Sequence[int]], label_ids: Sequence[int]
    ) -> Tensor:
        """Probability of each label next after each prompt.

        Args:
            prompts: Token ids of each prompt, at least one.
            label_ids: Token of each label; for a classifier, number of its class.

        Returns:
            Shape ``(num_prompts, num_labels)``, float32 on the CPU; not normalised over the labels.
            The same for the same list of prompts.
        """

    @abstractmethod
    def answers(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """What the guard writes after each prompt, greedily, without special tokens."""
