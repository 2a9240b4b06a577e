"""Conversations as one text, in the form of Anthropic's hh-rlhf.

References:
    Bai et al. (2022), Training a Helpful and Harmless Assistant, section 2.
    https://arxiv.org/abs/2204.05862
"""

import re
from typing import Any

from fedsafe.data.fields import BadRowError, text_of
from fedsafe.types import Conversation, Role, Turn

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def turns_of_transcript(fields: dict[str, Any], name: str) -> Conversation:
    r"""The turns of a field that must be ``\n\nHuman: …\n\nAssistant: …``; some may be empty.

    Raises:
        BadRowError: If it does not begin with a speaker.
    """
    before, *parts = _SPEAKER.split(text_of(fields, name))
    if before.strip() or not parts:
        raise BadRowError(
            f"`{name}` is neither a list of turns nor a text that begins with an empty line and "
            "`Human:`"
        )
    return [
        Turn(role=_ROLES[speaker], content=said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def refuse_empty(turns: Conversation, name: str) -> None:
    """Raise where somebody says nothing, as in a few conversations of hh-rlhf."""
    for index, turn in enumerate(turns):
        if not turn["content"]:
            raise BadRowError(f"turn {index} of `{name}` is empty")
