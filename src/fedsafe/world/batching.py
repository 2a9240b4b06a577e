"""Conversations of the miniature world as padded tensors."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from fedsafe.types import Conversation, TokenizedConversation

IGNORED = -100  # label of a token without loss


class Batch(NamedTuple):
    """Padded on the right: causal attention never looks there, so nothing needs a mask."""

    input_ids_BT: Tensor  # noqa: N815
    labels_BT: Tensor  # noqa: N815

    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with; a mask of ones, for it warns where there is none."""
        ids_BT = self.input_ids_BT  # noqa: N806
        return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}


def encode(
    chats: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedConversation]:
    """Tokenizes conversations; the assistant's words and the ends of its turns are the answers."""
    encoded = cast(
        BatchEncoding,
        tokenizer.apply_chat_template(
            as_dicts(chats), return_dict=True, return_assistant_tokens_mask=True
        ),
    )
    return [
        TokenizedConversation(ids, [bool(answer) for answer in mask])
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]


def pad(chats: Sequence[TokenizedConversation], *, pad_token_id: int) -> Batch:
    """Pads conversations to the longest; labels are the answers' tokens."""
    longest = max(len(chat.input_ids) for chat in chats)
    ids_BT = torch.full((len(chats), longest), pad_token_id)  # noqa: N806
    labels_BT = torch.full((len(chats), longest), IGNORED)  # noqa: N806
    for row, chat in enumerate(chats):
        ids = torch.tensor(chat.input_ids)
        ids_BT[row, : len(ids)] = ids
        labels_BT[row, : len(ids)] = ids.masked_fill(~torch.tensor(chat.answer_mask), IGNORED)
    return Batch(ids_BT, labels_BT)


def as_dicts(chats: Sequence[Conversation]) -> list[list[dict[str, str]]]:
    """The same conversations, in the type that transformers declares."""
    return cast(list[list[dict[str, str]]], list(chats))
