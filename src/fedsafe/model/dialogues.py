"""Conversations that a model takes part in, turn after turn, without reading anything twice."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from fedsafe.model.generation import Model
from fedsafe.types import Conversation


class Answer(NamedTuple):
    """One turn of the model."""

    text: str
    """Without special tokens."""
    num_tokens: int
    """Tokens generated, that of the end included."""
    num_read: int
    """Tokens of the conversation that were read for it, those read in earlier turns left out."""
    finished: bool
    """Whether the model ended it; False where the length limit or the last position did."""
    fits: bool = True
    """False where the conversation left no position for an answer: the text is empty."""


class Dialogues:
    """A batch of conversations with one model in one state (its adapter on, off or scaled).

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer, with a chat template.
    """

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def answer(
        self,
        conversations: Sequence[Conversation | None],
        *,
        max_new_tokens: int,
        seeds: Sequence[int],
        temperature: float = 0.0,
    ) -> list[Answer | None]:
        """The model's next turn in each conversation; None where there is no conversation.

        Called again with the same conversations grown by some turns, it reads the new part only.
        A conversation's answer depends on it and its seed, not on the others.

        Args:
            conversations: Each ends with a user's turn; as many as in the first call, None for
                those that are over.
            max_new_tokens: Tokens at which an answer is cut off.
            seeds: One a conversation, for sampling.
            temperature: 0 for the likeliest token each time; above 0 to sample.
        """
        raise NotImplementedError
