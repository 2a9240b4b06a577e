"""Batched decoding that reads nothing twice.

A batch is padded on the left: in front of each row, and between what it remembers and what it reads
now. Masks and positions are explicit, so the holes are nothing to the model. Rows that are over
leave the batch, and what was read of them is kept for their next turn.

Shapes: B rows, T columns of the batch, N columns read now, K tokens to draw, V tokens of the
vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from fedsafe.model.continuation import (
    NOTHING,
    Continuation,
    Memory,
    Model,
    Prompt,
    num_positions,
)
from fedsafe.model.grouping import of_like_length
from fedsafe.model.kv_buffer import KVBuffer
from fedsafe.model.rereading import pad_left
from fedsafe.model.sampling import checked, draws, next_tokens

_MAX_READ = 16384
"""Tokens that are read at a time, padding counted."""
_PADDING_CPU, _PADDING_GPU = 128, 2048
"""Tokens of padding that cost about as much as another pass through the model."""
_LEAVE_SHARE = 0.25
"""Share of a batch that must be over before it leaves."""


def continue_batch(
    model: Model,
    prompts: Sequence[Prompt],
    limits: Sequence[int],
    *,
    ends: frozenset[int],
    temperature: float,
    remember: bool,
) -> list[Continuation]:
    """What follows each prompt of a batch.

    Args:
        model: In evaluation mode; all its layers attend to every token before.
        prompts: The batch.
        limits: Tokens that each row may have, 1 or more.
        ends: Tokens that end a row.
        temperature: 0 for the likeliest token each time; above 0 to sample.
        remember: Whether the continuations carry what was read.
    """
    rows = [_Row(*each) for each in zip(prompts, limits, strict=True)]
    batch = _Batch(model, rows, temperature=temperature, remember=remember)
    while True:
        tokens = batch.take_tokens(ends)
        if all(row.over for row in batch.rows):
            break
        if sum(row.over for row in batch.rows) >= _LEAVE_SHARE * len(batch.rows):
            tokens = batch.let_leave(tokens)
        batch.feed(tokens)
    batch.park_all()
    return [row.continuation for row in rows]


class _Row:
    """One prompt and what follows it so far."""

    def __init__(self, prompt: Prompt, limit: int) -> None:
        self.prompt = prompt
        self.limit = limit
        # without the last token, which is read in any case: its logits are wanted
        pairs = zip(prompt.ids[:-1], prompt.memory.ids, strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.num_known = known if prompt.memory.layers else 0
        if not self.num_known:
            prompt.memory.layers.clear()
        self.generated: list[int] = []
        self.finished = self.over = False
        self.memory = NOTHING

    @property
    def unread(self) -> list[int]:
        return self.prompt.ids[self.num_known :]

    @property
    def continuation(self) -> Continuation:
        return Continuation(self.generated, self.finished, len(self.unread), self.memory)

    def take(self, token: int, ends: frozenset[int]) -> None:
        if self.over:  # it waits to leave the batch
            return
        self.generated.append(token)
        self.finished = token in ends
        self.over = self.finished or len(self.generated) == self.limit


class _Batch:
    """Rows that go on together, a token each at a time."""

    def __init__(
        self, model: Model, rows: Sequence[_Row], *, temperature: float, remember: bool
    ) -> None:
        self._model, self._temperature, self._remember = model, temperature, remember
        longest = max(row.limit for row in rows)
        groups = _reading_groups(model, rows)
        self.rows = [row for group in groups for row in group]
        readings = [_read(model, group) for group in groups]
        self._logits_BV = torch.cat([reading.logits_BV for reading in readings])
        self._layers = _stack([reading.layers for reading in readings])
        self._length = self._layers[0].length  # of the columns in use
        masks = [pad(each.mask_BT, (self._length - each.mask_BT.shape[1], 0)) for each in readings]
        self._mask_BT = pad(torch.cat(masks), (0, longest))
        self._positions_B = self._mask_BT.sum(1)
        self._num_taken = 0
        self._draws_BK: Tensor | None = None
        if temperature > 0:
            self._draws_BK = draws([row.prompt.seed for row in self.rows], longest).to(model.device)

    def take_tokens(self, ends: frozenset[int]) -> Tensor:
        """Give each row its next token, shape ``(B,)``."""
        draws_B = None if self._draws_BK is None else self._draws_BK[:, self._num_taken]  # noqa: N806
        tokens_B = next_tokens(self._logits_BV, draws_B, self._temperature)  # noqa: N806
        self._num_taken += 1
        for row, token in zip(self.rows, checked(tokens_B), strict=True):
            row.take(token, ends)
        return tokens_B

    def feed(self, tokens_B: Tensor) -> None:  # noqa: N803
        """Let the model read a token of each row."""
        for layer in self._layers:
            layer.make_room(self._mask_BT.shape[1] - self._length)
        self._mask_BT[:, self._length] = 1
        self._length += 1
        output = self._model(
            input_ids=tokens_B[:, None],
            attention_mask=self._mask_BT[:, : self._length],
            position_ids=self._positions_B[:, None],
            past_key_values=Cache(layers=list(self._layers)),
            use_cache=True,
            logits_to_keep=1,
        )
        self._logits_BV = output.logits[:, -1]
        # rows that are over must not run out of positions while they wait
        self._positions_B = (self._positions_B + 1).clamp(max=num_positions(self._model) - 1)

    def let_leave(self, tokens_B: Tensor) -> Tensor:  # noqa: N803
        """Park the rows that are over; returns the tokens of the others."""
        self.park([place for place, row in enumerate(self.rows) if row.over])
        staying = [place for place, row in enumerate(self.rows) if not row.over]
        self.rows = [self.rows[place] for place in staying]
        places = torch.tensor(staying, device=self._mask_BT.device)
        mask = self._mask_BT[places]
        begin = int(mask.any(0).int().argmax())  # behind columns that only longer rows had
        self._mask_BT = mask[:, begin:]
        self._length -= begin
        for layer in self._layers:
            layer.select(places, begin)
        self._positions_B = self._positions_B[places]
        if self._draws_BK is not None:
            self._draws_BK = self._draws_BK[places]
        return tokens_B[places]

    def park(self, places: Sequence[int]) -> None:
        """Keep what was read of some rows."""
        if self._remember and places:
            self._copy(places, iter(self._layers))

    def park_all(self) -> None:
        """Keep what was read of all rows; a layer of the batch is freed once it is copied."""
        if self._remember:
            self._copy(range(len(self.rows)), _taken_out(self._layers))

    def _copy(self, places: Sequence[int], layers: Iterator[KVBuffer]) -> None:
        device = self._mask_BT.device
        masks = self._mask_BT[torch.tensor(places, device=device)].cpu()  # waits for a GPU once
        columns = []
        for place, mask in zip(places, masks, strict=True):
            row = self.rows[place]
            ids = (*row.prompt.ids, *row.generated[:-1])  # the last one was not read
            columns.append(mask.nonzero()[: len(ids), 0].to(device))
            row.memory = Memory(ids, [])
        for layer in layers:
            for place, used in zip(places, columns, strict=True):
                self.rows[place].memory.layers.append(layer.row(place, used))


class _Reading(NamedTuple):
    """What the model made of some prompts."""

    logits_BV: Tensor  # noqa: N815
    layers: list[KVBuffer]
    mask_BT: Tensor  # noqa: N815


def _reading_groups(model: Model, rows: Sequence[_Row]) -> list[list[_Row]]:
    padding = _PADDING_CPU if model.device.type == "cpu" else _PADDING_GPU
    lengths = [len(row.unread) for row in rows]
    groups = of_like_length(lengths, max_rows=len(rows), max_padding=padding, max_tokens=_MAX_READ)
    return [[rows[place] for place in places] for places in groups]


def _read(model: Model, rows: Sequence[_Row]) -> _Reading:
    """Let the model read what the rows do not remember."""
    ids, unread = (each.to(model.device) for each in pad_left([row.unread for row in rows]))
    mask, cache = unread, Cache(layer_class_to_replicate=KVBuffer)
    longest = max(row.num_known for row in rows)
    if longest:
        layers = _remembered(rows, room=ids.shape[1])
        known = pad_left([[1] * row.num_known for row in rows])[1].to(model.device)
        mask, cache = torch.cat([known, unread], 1), Cache(layers=list(layers))
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, longest:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    layers = [layer for layer in cache.layers if isinstance(layer, KVBuffer)]
    return _Reading(output.logits[:, -1], layers, mask)


def _remembered(rows: Sequence[_Row], *, room: int) -> list[KVBuffer]:
    """Each layer's keys and values of what the rows know; zeros where that is nothing.

    A layer of the memories is freed once it is copied.
    """
    memories = [row.prompt.memory.layers for row in rows]
    some = next(row.prompt.memory.layers for row in rows if row.num_known)
    layers = []
    while some:
        any_row = some[0]  # of a row that knows nothing, no column is copied
        taken = [memory.pop(0) if memory else any_row for memory in memories]
        known = [
            (keys[None, :, : row.num_known], values[None, :, : row.num_known])
            for row, (keys, values) in zip(rows, taken, strict=True)
        ]
        layers.append(KVBuffer.stack(known, room=room))
    return layers


def _stack(batches: Sequence[list[KVBuffer]]) -> list[KVBuffer]:
    """Each layer's batches one below the other; a layer of theirs is freed once it is copied."""
    if len(batches) == 1:
        return batches[0]
    return [
        KVBuffer.stack([layer.in_use for layer in same], room=0)
        for same in zip(*map(_taken_out, batches), strict=True)
    ]


def _taken_out(layers: list[KVBuffer]) -> Iterator[KVBuffer]:
    while layers:
        yield layers.pop(0)
