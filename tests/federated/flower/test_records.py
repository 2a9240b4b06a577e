import math

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedsafe.federated.flower.records import FACTS, TENSORS, from_records, to_records
from fedsafe.federated.remote.letter import Letter

LETTER = Letter({"kind": "visit", "loss": 0.1, "name": "ada", "of": {"a": [1]}}, bytes(range(256)))


@pytest.mark.parametrize("tensors", [b"", LETTER.tensors], ids=["none", "some"])
def test_a_letter_comes_back_as_it_was(tensors: bytes) -> None:
    letter = LETTER._replace(tensors=tensors)
    carried = recorddict_from_proto(recorddict_to_proto(to_records(letter)))
    assert from_records(carried) == letter


def test_numbers_that_json_does_not_know_arrive() -> None:
    facts = from_records(to_records(Letter({"loss": math.nan, "nll": math.inf}))).facts
    assert math.isnan(facts["loss"])
    assert facts["nll"] == math.inf


def test_tensors_are_neither_copied_nor_turned_into_a_numpy_file() -> None:
    records = to_records(LETTER)
    assert records.array_records[TENSORS][TENSORS].data is LETTER.tensors


def facts(text: object) -> RecordDict:
    return RecordDict({FACTS: ConfigRecord({FACTS: text})})  # type: ignore[dict-item]


def tensors(name: str, stype: str) -> RecordDict:
    records = to_records(Letter({}))
    records[TENSORS] = ArrayRecord({name: Array("uint8", (1,), stype, b"x")})
    return records


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (RecordDict(), "holds nothing, and no facts of a letter"),
        (RecordDict({"weights": ConfigRecord({})}), "holds weights, and no facts"),
        (facts(3), "no facts of a letter"),
        (facts("{"), "facts are no JSON"),
        (facts("[1]"), "facts are a list; give an object"),
        (tensors("other", "safetensors"), "tensors are no safetensors file"),
        (tensors(TENSORS, "numpy.ndarray"), "tensors are no safetensors file"),
    ],
    ids=["empty", "foreign", "number", "no-json", "list", "other-name", "numpy-file"],
)
def test_what_is_no_letter_is_refused(records: RecordDict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_records(records)
