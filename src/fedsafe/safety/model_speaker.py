"""A model of transformers that talks with its adapter on, off or scaled."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedsafe.model.adapter import adapter_scale
from fedsafe.model.continuation import Model
from fedsafe.model.dialogues import Answer, Dialogues
from fedsafe.safety.revision import Speaker, Speech
from fedsafe.types import Conversation


class ModelSpeaker(Speaker):
    """Conversations with a model in memory.

    Args:
        model: A causal language model; without an adapter every scale of it is the base alone.
        tokenizer: Its tokenizer, with a chat template.
    """

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model
        self._tokenizer = tokenizer

    @property
    def has_adapter(self) -> bool:
        """See `Speaker`."""
        return isinstance(self._model, PeftModel)

    def begin(self, adapter_scale: float) -> Speech:
        """See `Speaker`; conversations of different scales may take turns."""
        return _ScaledDialogues(self._model, self._tokenizer, adapter_scale)


class _ScaledDialogues(Speech):
    """Dialogues that put the adapter at their own strength whenever the model speaks."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, scale: float) -> None:
        self._model = model
        self._dialogues = Dialogues(model, tokenizer)
        self._scale = scale

    def answer(
        self,
        conversations: Sequence[Conversation | None],
        *,
        max_new_tokens: int,
        seeds: Sequence[int],
        temperature: float = 0.0,
    ) -> list[Answer | None]:
        """See `Dialogues.answer`."""
        with self._scaled():
            return self._dialogues.answer(
                conversations, max_new_tokens=max_new_tokens, seeds=seeds, temperature=temperature
            )

    def _scaled(self) -> AbstractContextManager[None]:
        if isinstance(self._model, PeftModel):
            return adapter_scale(self._model, self._scale)
        return nullcontext()
