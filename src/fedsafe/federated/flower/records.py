"""A `Letter` as Flower's records, and back; the bytes of its tensors stay as they are.

Flower's own forms of an array are NumPy files. Ours is one entry of raw bytes, which Flower only
carries: what it means is checked by `federated.remote.tensors`.
"""

import json

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsafe.federated.remote.letter import Letter

FACTS = "facts"
TENSORS = "tensors"
STYPE = "safetensors"


def to_records(letter: Letter) -> RecordDict:
    """The letter, as the content of a message."""
    records = RecordDict({FACTS: ConfigRecord({FACTS: json.dumps(letter.facts)})})
    if letter.tensors:
        data = letter.tensors
        records[TENSORS] = ArrayRecord({TENSORS: Array("uint8", (len(data),), STYPE, data)})
    return records


def from_records(records: RecordDict) -> Letter:
    """Read what `to_records` wrote.

    Raises:
        ValueError: If it is no letter.
    """
    config = records.config_records.get(FACTS)
    text = None if config is None else config.get(FACTS)
    if not isinstance(text, str):
        raise ValueError(
            f"the message holds {', '.join(sorted(records)) or 'nothing'}, and no facts of a "
            "letter; both ends must run fedsafe"
        )
    return Letter.read(text, _tensors(records))


def _tensors(records: RecordDict) -> bytes:
    arrays = records.array_records.get(TENSORS)
    if arrays is None:
        return b""
    if set(arrays) != {TENSORS} or arrays[TENSORS].stype != STYPE:
        raise ValueError(f"the message's tensors are no {STYPE} file")
    return bytes(arrays[TENSORS].data)
