"""What travels between server and client: facts as JSON, and tensors as a safetensors file.

Imports nothing heavy: the process that only hands a letter on must start in an instant.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

_LENGTH_BYTES = 8


class Letter(NamedTuple):
    """One message, in either direction."""

    facts: Mapping[str, Any]
    """Numbers, names and settings; never a sample's text. Must be JSON."""
    tensors: bytes = b""
    """A safetensors file in memory; empty where none travel."""

    def to_bytes(self) -> bytes:
        """The letter as one string of bytes: length of the facts, facts, tensors."""
        facts = json.dumps(self.facts, allow_nan=True).encode()
        return len(facts).to_bytes(_LENGTH_BYTES, "little") + facts + self.tensors

    @staticmethod
    def from_bytes(data: bytes) -> "Letter":
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: If it is no letter.
        """
        size = int.from_bytes(data[:_LENGTH_BYTES], "little")
        end = _LENGTH_BYTES + size
        if end > len(data):
            raise ValueError(
                f"{len(data)} bytes are no letter: its facts alone would take {size}; both ends "
                "must run the same version of fedsafe"
            )
        return Letter.read(data[_LENGTH_BYTES:end], data[end:])

    @staticmethod
    def read(facts: str | bytes, tensors: bytes = b"") -> "Letter":
        """A letter whose facts came as JSON.

        Raises:
            ValueError: If they are none, or no object.
        """
        try:
            found = json.loads(facts)
        except ValueError as error:
            raise ValueError(f"the letter's facts are no JSON ({error})") from None
        if not isinstance(found, dict):
            raise ValueError(f"the letter's facts are a {type(found).__name__}; give an object")
        return Letter(found, tensors)
