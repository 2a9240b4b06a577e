"""Better and worse answers as tokens, and the batches of a server visit."""

import itertools
from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedsafe.data.chat import RenderedConversation, render_answers, tokenize_rendered
from fedsafe.data.packing import Pack, PreferenceBatch, SupervisedBatch, pack, split_by_budget
from fedsafe.data.sources import Rejected, place_of
from fedsafe.peers import ALONE, Peers
from fedsafe.types import Conversation, PreferencePair, Turn

_RENDERED_TOGETHER = 256
_MAX_PACK_TOKENS = 8192

Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Token ids of a prompt and its answer, and which of them are the answer's."""


class PreferenceStore:
    """Pairs as tokens; the loss is on the answer, never on the prompt's own earlier answers.

    Args:
        pairs: The pairs.
        tokenizer: With a chat template.
        max_length: Tokens kept of prompt and answer, from their start.

    Attributes:
        usable: Pairs whose chosen answer has a token left, as indices into `pairs`; everything
            below counts in these.
        comparable: Which of the usable ones have a rejected answer that the chat template takes,
            has a token left and differs from the chosen one, also after both were cut, shape
            ``(len(self),)``.
        left_out: The pairs that are not usable, and why.
        longest: Tokens of the longest prompt with its answer; 0 where there is none.
        largest_id: Largest token id; -1 where there is none.
    """

    usable: NDArray[np.int64]
    comparable: NDArray[np.bool_]
    left_out: list[Rejected]
    longest: int
    largest_id: int

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
    ) -> None:
        self.left_out = []
        self._num_pairs = len(pairs)
        self._chosen: list[Tokens] = []
        self._rejected: list[Tokens | None] = []
        self._places: list[str] = []
        usable = []
        too_long = f"no answer token within max_length {max_length}; raise max_length"
        for number, chosen, rejected in _tokenized(pairs, tokenizer, max_length=max_length):
            if isinstance(chosen, str) or not chosen[1].any():
                reason = chosen if isinstance(chosen, str) else too_long
                self.left_out.append(Rejected(pairs[number].source, pairs[number].row, reason))
                continue
            usable.append(number)
            self._places.append(place_of(pairs[number].source, pairs[number].row))
            self._chosen.append(chosen)
            self._rejected.append(_worse(rejected, chosen))
        self.usable = np.array(usable, dtype=np.int64)
        self.comparable = np.array([each is not None for each in self._rejected], dtype=np.bool_)
        kept = [ids for ids, _ in itertools.chain(self._chosen, filter(None, self._rejected))]
        self.longest = max(map(len, kept), default=0)
        self.largest_id = max((int(ids.max()) for ids in kept), default=-1)

    def __len__(self) -> int:
        """Number of usable pairs."""
        return len(self._chosen)

    def __add__(self, other: "PreferenceStore") -> "PreferenceStore":
        """The pairs of both, this store's first."""
        both = copy(self)
        both._chosen = self._chosen + other._chosen
        both._rejected = self._rejected + other._rejected
        both._places = self._places + other._places
        both._num_pairs = self._num_pairs + other._num_pairs
        both.usable = np.concatenate([self.usable, self._num_pairs + other.usable])
        both.comparable = np.concatenate([self.comparable, other.comparable])
        both.left_out = self.left_out + other.left_out
        both.longest = max(self.longest, other.longest)
        both.largest_id = max(self.largest_id, other.largest_id)
        return both

    def named(self, indices: Sequence[int]) -> str:
        """Where these pairs came from, for an error message."""
        return "; ".join(self._places[i] for i in indices)

    def supervised(
        self, indices: Sequence[int], *, num_parts: int = 1, peers: Peers = ALONE
    ) -> list[SupervisedBatch]:
        """One optimizer step on chosen answers, or a rank's share of it.

        Args:
            indices: The step's pairs.
            num_parts: Packs of each rank at most, for memory.
            peers: Ranks that share the step. All get as many packs; some may hold nothing.
        """
        normalizer = self._num_chosen_tokens(indices)
        return [
            SupervisedBatch(**vars(pack([self._chosen[i] for i in part])), normalizer=normalizer)
            for part in _parts(indices, num_parts, peers)
        ]

    def preference(
        self,
        indices: Sequence[int],
        *,
        reference: Tensor,
        beta: float,
        nll_weight: float,
        num_parts: int = 1,
        peers: Peers = ALONE,
    ) -> list[PreferenceBatch | SupervisedBatch]:
        """One optimizer step on comparable pairs, or a rank's share of it.

        Args:
            indices: The step's pairs, all comparable.
            reference: Log-probabilities under the reference adapter, chosen and rejected, of every
                pair, shape ``(len(self), 2)``; rows that are not asked for may be anything.
            beta: See `PreferenceBatch`.
            nll_weight: See `PreferenceBatch`.
            num_parts: Packs of each rank at most, for memory.
            peers: Ranks that share the step. All get as many packs; one that holds nothing is a
                `SupervisedBatch`, whose loss is 0.
        """
        num_chosen_tokens = self._num_chosen_tokens(indices)
        return [
            PreferenceBatch(
                **vars(pack(self._both(part))),
                reference=reference[part].reshape(-1),
                num_pairs=len(indices),
                num_chosen_tokens=num_chosen_tokens,
                beta=beta,
                nll_weight=nll_weight,
            )
            if part
            else SupervisedBatch(**vars(pack([])), normalizer=1)
            for part in _parts(indices, num_parts, peers)
        ]

    def both_answers(self, indices: Sequence[int]) -> Iterator[tuple[list[int], Pack]]:
        """Packs of chosen and rejected answers, alternating, for the reference's log-probabilities.

        Args:
            indices: Comparable pairs, each once.

        Yields:
            ``(indices, pack)`` of each pack, longest pairs first; every index of `indices` once.
        """
        lengths = [self.num_tokens([index], both=True) for index in indices]
        groups = split_by_budget(np.array(lengths, dtype=np.int32), max_tokens=_MAX_PACK_TOKENS)
        for group in groups:
            together = [indices[place] for place in group]
            yield together, pack(self._both(together))

    def num_tokens(self, indices: Sequence[int], *, both: bool) -> int:
        """Tokens of these pairs' prompts with their chosen, or with both answers."""
        samples = self._both(indices) if both else [self._chosen[i] for i in indices]
        return sum(len(ids) for ids, _ in samples)

    def _num_chosen_tokens(self, indices: Sequence[int]) -> int:
        return sum(int(self._chosen[i][1].sum()) for i in indices)

    def _both(self, indices: Sequence[int]) -> list[Tokens]:
        """Chosen and rejected, alternating."""
        samples = []
        for index in indices:
            rejected = self._rejected[index]
            assert rejected is not None, f"pair {index} is not comparable"
            samples += [self._chosen[index], rejected]
        return samples


def _parts(indices: Sequence[int], num_parts: int, peers: Peers) -> list[list[int]]:
    """A rank's parts of a step, dealt out evenly; those that all ranks had empty are left out."""
    stride = num_parts * peers.size
    firsts = range(0, min(stride, len(indices)), peers.size)
    return [list(indices[first + peers.index :: stride]) for first in firsts]


def _worse(rejected: Tokens | str | None, chosen: Tokens) -> Tokens | None:
    """The rejected answer if it can be compared with the chosen one."""
    if rejected is None or isinstance(rejected, str):
        return None
    same = np.array_equal(rejected[0], chosen[0])
    return rejected if rejected[1].any() and not same else None


def _tokenized(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Iterator[tuple[int, Tokens | str, Tokens | str | None]]:
    """Each pair's number, chosen and rejected answer, or why the template refuses the answer."""
    for first in range(0, len(pairs), _RENDERED_TOGETHER):
        some = pairs[first : first + _RENDERED_TOGETHER]
        conversations = [[*pair.prompt, _turn(pair.chosen)] for pair in some] + [
            [*pair.prompt, _turn(pair.rejected)] for pair in some if pair.rejected is not None
        ]
        tokens = iter(_tokens(conversations, tokenizer, max_length=max_length))
        chosen = list(itertools.islice(tokens, len(some)))
        for number, pair in enumerate(some):
            rejected = None if pair.rejected is None else next(tokens)
            yield first + number, chosen[number], rejected


def _turn(answer: str) -> Turn:
    return {"role": "assistant", "content": answer}


def _tokens(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Tokens | str]:
    rendered = [_last_answer(tokenizer, each) for each in conversations]
    texts = [each for each in rendered if isinstance(each, RenderedConversation)]
    encoded = iter(tokenize_rendered(tokenizer, texts, max_length=max_length))
    return [each if isinstance(each, str) else _arrays(*next(encoded)) for each in rendered]


def _last_answer(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> RenderedConversation | str:
    """The conversation with its last answer marked, or why the template refuses it."""
    try:
        rendered = render_answers(tokenizer, conversation)
    except ValueError as error:
        return str(error)
    return rendered._replace(answers=rendered.answers[-1:])


def _arrays(input_ids: list[int], answer_mask: list[bool]) -> Tokens:
    mask = np.array(answer_mask, dtype=np.bool_)
    mask[:1] = False  # nothing predicts the first token
    return np.array(input_ids, dtype=np.int32), mask
