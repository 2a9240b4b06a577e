"""What a guard reads: a conversation in its format, as token ids that fit its window."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from fedsafe.safety.guard_format import GuardFormat
from fedsafe.types import Conversation


class GuardPrompt(NamedTuple):
    """What a guard reads of one conversation."""

    ids: list[int]
    """Token ids up to and including the opening: the label comes next."""
    shortened: bool


class GuardPrompts:
    """Renders conversations as prompts of one guard.

    Args:
        format_: The guard's format.
        tokenizer: Its tokenizer; for `image_text` guards the processor's, with its chat template.
        window: Tokens that the guard can read.
        too_long: What to do with a conversation that does not fit: judge its `head_and_tail`, or
            stop with an `error`.
        categories: Kinds of harm in place of the guard's own, code to description; None keeps them.
        excluded_categories: Codes to leave out.
    """

    def __init__(
        self,
        format_: GuardFormat,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int,
        too_long: Literal["head_and_tail", "error"],
        categories: Mapping[str, str] | None,
        excluded_categories: Sequence[str],
    ) -> None:
        raise NotImplementedError

    def render(
        self, conversations: Sequence[Conversation], options: Mapping[str, Any]
    ) -> list[GuardPrompt]:
        """The prompts of conversations that all end with the same role.

        Args:
            conversations: As `Guard.judge` takes them.
            options: Template options beside those of the question, such as those of a risk.
        """
        raise NotImplementedError
