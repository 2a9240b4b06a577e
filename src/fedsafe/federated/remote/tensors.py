"""Named tensors as safetensors bytes, checked before anything is made of them.

The header of a safetensors file says names, types and shapes in a few kilobytes of JSON; a file
that does not hold exactly what is expected is refused by it.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fedsafe.federated.aggregation import RefusedUpdateError
from fedsafe.federated.remote.facts import Encoding
from fedsafe.model.flat_adapter import FlatAdapter

_TYPES: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
}
_LENGTH_BYTES = 8


def pack_adapter(
    adapter: FlatAdapter, vector: Tensor, others: Mapping[str, Tensor], *, encoding: Encoding
) -> bytes:
    """An adapter by the names of its parameters, and other vectors of its size, for a letter.

    Args:
        adapter: Gives names and shapes.
        vector: The adapter, flat float32, shape ``(num_params,)``.
        others: Vectors of the same shape, by name.
        encoding: Type that the values are rounded to.
    """
    return pack_tensors({**adapter.named_views(vector), **others}, encoding=encoding)


def unpack_adapter(
    adapter: FlatAdapter, data: bytes, others: Iterable[str], *, encoding: Encoding
) -> tuple[Tensor, dict[str, Tensor]]:
    """Read what `pack_adapter` wrote, if it is what is expected.

    Args:
        adapter: Gives names and shapes.
        data: What arrived.
        others: Names of the other vectors.
        encoding: The type that was agreed.

    Returns:
        The adapter, flat float32, shape ``(num_params,)``, and the others, on the CPU.

    Raises:
        RefusedUpdateError: See `unpack_tensors`.
    """
    shapes: dict[str, tuple[int, ...]] = {
        **{name: tuple(shape) for name, shape in zip(adapter.names, adapter.shapes, strict=True)},
        **dict.fromkeys(others, (adapter.num_params,)),
    }
    named = unpack_tensors(data, shapes, encoding=encoding)
    vector = torch.cat([named[name].reshape(-1) for name in adapter.names])
    return vector, {name: named[name] for name in others}


def pack_update(
    adapter: FlatAdapter,
    trained: Tensor,
    start: Tensor,
    others: Mapping[str, Tensor],
    *,
    encoding: Encoding,
) -> bytes:
    """What a client trained, for a letter.

    As float32 the adapter itself, bit for bit. As bfloat16 what has changed: rounding then loses a
    share of the change, where of the adapter itself it could lose all of a small one.

    Args:
        adapter: Gives names and shapes.
        trained: The adapter, flat float32, shape ``(num_params,)``.
        start: The one that it was trained from, as it arrived.
        others: Vectors of the same shape, by name.
        encoding: Type that the values are rounded to.
    """
    vector = trained if encoding == "float32" else trained - start.to(trained.device)
    return pack_adapter(adapter, vector, others, encoding=encoding)


def unpack_update(
    adapter: FlatAdapter, data: bytes, start: Tensor, others: Iterable[str], *, encoding: Encoding
) -> tuple[Tensor, dict[str, Tensor]]:
    """Read what `pack_update` wrote; see `unpack_adapter`.

    Args:
        adapter: Gives names and shapes.
        data: What arrived.
        start: The adapter that was sent, before it was rounded.
        others: Names of the other vectors.
        encoding: The type that was agreed.
    """
    vector, named = unpack_adapter(adapter, data, others, encoding=encoding)
    return vector if encoding == "float32" else start.to("cpu") + vector, named


def pack_tensors(named: Mapping[str, Tensor], *, encoding: Encoding) -> bytes:
    """The tensors as a safetensors file.

    Args:
        named: By name.
        encoding: Type that the values are rounded to.
    """
    dtype = _TYPES[encoding][0]
    return save({name: x.detach().to("cpu", dtype).contiguous() for name, x in named.items()})


def unpack_tensors(
    data: bytes, expected: Mapping[str, tuple[int, ...]], *, encoding: Encoding
) -> dict[str, Tensor]:
    """Read what `pack_tensors` wrote, if it is what is expected.

    Args:
        data: What arrived.
        expected: The shape of each tensor, by name.
        encoding: The type that was agreed.

    Returns:
        The tensors in float32, by name, on the CPU.

    Raises:
        RefusedUpdateError: If the size, a name, a shape or a type is another; says which. Nothing
            was allocated then.
    """
    dtype, code = _TYPES[encoding]
    size = sum(torch.Size(shape).numel() for shape in expected.values()) * dtype.itemsize
    header = _read_header(data, values=size)
    missing, unknown = expected.keys() - header.keys(), header.keys() - expected.keys()
    if missing or unknown:
        raise RefusedUpdateError(
            f"{len(missing)} tensors are missing and {len(unknown)} are unknown, the first is "
            f"{min(missing | unknown)!r}"
        )
    for name, shape in expected.items():
        given = header[name]
        if given.get("dtype") != code:
            raise RefusedUpdateError(f"{name} is of type {given.get('dtype')}; agreed was {code}")
        if given.get("shape") != list(shape):
            raise RefusedUpdateError(
                f"{name} is of shape {given.get('shape')}; expected {list(shape)}"
            )
    try:
        return {name: x.float() for name, x in load(data).items()}
    except Exception as error:  # noqa: BLE001 - safetensors has an exception type of its own
        raise RefusedUpdateError(f"the tensors cannot be read ({error})") from None


def _read_header(data: bytes, *, values: int) -> dict[str, dict[str, Any]]:
    """Names, types and shapes; refuses a file that is not as long as its values need."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) != _LENGTH_BYTES + length + values:
        raise RefusedUpdateError(
            f"the tensors take {len(data):,} bytes, of which {length:,} are a header; their values "
            f"alone should take {values:,}"
        )
    try:
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    except ValueError:
        raise RefusedUpdateError("the tensors have no readable header") from None
    if not isinstance(header, dict) or not all(isinstance(x, dict) for x in header.values()):
        raise RefusedUpdateError("the tensors have no readable header")
    header.pop("__metadata__", None)
    return header
