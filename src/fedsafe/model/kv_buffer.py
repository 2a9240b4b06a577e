"""Keys and values of one layer for a batch of rows, in a buffer with room for tokens to come.

transformers' own `DynamicLayer` copies all of them at every token; here one is written in place.

Shapes: B rows, H key/value heads, T columns in use, D head size.
"""

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

_STEP = 64
"""Columns that a full buffer grows by: a copy of all of it every so many tokens."""


class KVBuffer(CacheLayerMixin):
    """One layer of a `transformers.Cache`; holds every token, as full attention needs it."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape, type and device from the first keys and values."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add columns; returns views of all in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.length, self.length + key_states.shape[2]
        if end > self._keys.shape[2]:
            self.reserve(max(end, begin + _STEP) if begin else end)
        self._keys[:, :, begin:end] = key_states
        self._values[:, :, begin:end] = value_states
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def make_room(self, columns_left: int) -> None:
        """Room for the next column and some after it, of so many that are to come at most."""
        if self.length == self._keys.shape[2]:
            self.reserve(self.length + min(_STEP, columns_left))

    def reserve(self, capacity: int) -> None:
        """Make room for so many columns, those in use counted."""
        self.keys, self.values = (
            _wider(each, self.length, capacity) for each in (self._keys, self._values)
        )

    def select(self, rows: Tensor, begin: int) -> None:
        """Keep some rows, without their first columns."""
        self.keys, self.values = self._keys[rows, :, begin:], self._values[rows, :, begin:]
        self.length -= begin

    def row(self, row: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of some columns of a row, shape ``(H, T, D)``."""
        return self._keys[row].index_select(1, columns), self._values[row].index_select(1, columns)

    @classmethod
    def stack(cls, batches: Sequence[tuple[Tensor, Tensor]], *, room: int) -> Self:
        """Batches of shape ``(B, H, T, D)`` one below the other; shorter ones begin with zeros.

        Masked columns must hold numbers: zero times NaN is NaN.

        Args:
            batches: Keys and values.
            room: Columns to come.
        """
        layer = cls()
        layer.length = max(keys.shape[2] for keys, _ in batches)
        capacity = layer.length + room
        layer.keys = _stack([keys for keys, _ in batches], layer.length, capacity)
        layer.values = _stack([values for _, values in batches], layer.length, capacity)
        layer.is_initialized = True
        return layer

    @property
    def in_use(self) -> tuple[Tensor, Tensor]:
        """Views of the keys and values, shape ``(B, H, T, D)``."""
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    @property
    def _keys(self) -> Tensor:
        assert self.keys is not None
        return self.keys

    @property
    def _values(self) -> Tensor:
        assert self.values is not None
        return self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask covers, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _wider(buffer: Tensor, length: int, capacity: int) -> Tensor:
    rows, heads, _, size = buffer.shape
    wider = buffer.new_empty(rows, heads, capacity, size)
    wider[:, :, :length] = buffer[:, :, :length]
    return wider


def _stack(batches: Sequence[Tensor], length: int, capacity: int) -> Tensor:
    num_rows = sum(batch.shape[0] for batch in batches)
    _, heads, _, size = batches[0].shape
    stacked = batches[0].new_zeros(num_rows, heads, capacity, size)
    split = stacked.split([batch.shape[0] for batch in batches])
    for part, batch in zip(split, batches, strict=True):
        part[:, :, length - batch.shape[2] : length] = batch
    return stacked
