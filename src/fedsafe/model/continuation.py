"""A prompt of token ids and what a model makes of it."""

import sys
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model = PreTrainedModel | PeftModel
Seed = int | tuple[int, ...]


class Memory(NamedTuple):
    """What a model has read of one conversation; the batch that goes on from it takes it apart.

    Shapes: H key/value heads, T tokens, D head size.
    """

    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer, shape ``(H, T, D)``; none once they were taken."""


NOTHING = Memory((), [])


class Prompt(NamedTuple):
    """What a row of a batch goes on from."""

    ids: list[int]
    """All of it, what was read before too."""
    seed: Seed = 0
    memory: Memory = NOTHING
    """What was read before; where it differs from `ids`, the rest of it is of no use. Serves once:
    its layers are taken out, so that they and the batch's copies are not kept side by side."""


class Continuation(NamedTuple):
    """What followed a prompt."""

    ids: list[int]
    """Tokens generated, that of the end included."""
    finished: bool
    """Whether the last one is an end."""
    num_read: int
    """Tokens of the prompt that were read for it."""
    memory: Memory = NOTHING
    """The prompt and all but the last token generated, which nothing has read yet."""

    @property
    def said(self) -> list[int]:
        """The tokens without that of the end, which not every tokenizer marks as special."""
        return self.ids[:-1] if self.finished else self.ids


def base_of(model: Model) -> Any:
    """The model of transformers without PEFT's wrapping."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokenizer's end and the model's own: some end a turn with a token besides."""
    own = base_of(model).generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return frozenset(ends)


def num_positions(model: Model) -> int:
    """Tokens that the model can read at most."""
    positions: int | None = getattr(
        base_of(model).config.get_text_config(), "max_position_embeddings", None
    )
    return sys.maxsize if positions is None else positions
