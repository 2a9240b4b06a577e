import datasets
import numpy as np
import pytest

from fedsafe.data import loaders
from fedsafe.data.loaders import EvaluationBatch, evaluation_loader
from fedsafe.data.tokens import TokenStore
from fedsafe.peers import Peers


@pytest.fixture
def store() -> TokenStore:
    """Twelve samples of 3 to 14 tokens."""
    ids = [[number] * (3 + number) for number in range(12)]
    masks = [[0, *[1] * (len(each) - 1)] for each in ids]
    types = {"input_ids": datasets.List(datasets.Value("int32"))}
    types["answer_mask"] = datasets.List(datasets.Value("uint8"))
    columns = {"input_ids": ids, "answer_mask": masks}
    return TokenStore(datasets.Dataset.from_dict(columns, features=datasets.Features(types)))


def texts_of(batch: EvaluationBatch) -> tuple[int, ...]:
    """The samples of a batch, which are their tokens; none of an empty one."""
    if not len(batch.targets):
        return ()
    return tuple(int(ids[0]) for ids in batch.input_ids[0].split(batch.segment_lengths))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_ranks_evaluate_each_pack_once_for_each_client_at_the_same_time(
    store: TokenStore, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "_EVALUATION_TOKENS", 30)
    some, clients = np.arange(1, 12), [4, 7]
    whole = list(evaluation_loader(store, some, clients))
    shares = [
        list(evaluation_loader(store, some, clients, Peers(index, size))) for index in range(size)
    ]
    assert len({len(share) for share in shares}) == 1
    for together in zip(*shares, strict=True):
        assert len({batch.client for batch in together}) == 1
    for client in clients:
        expected = [texts_of(batch) for batch in whole if batch.client == client]
        found = [
            texts_of(batch)
            for together in zip(*shares, strict=True)
            for batch in together
            if batch.client == client
        ]
        assert [each for each in found if each] == expected
        assert len(found) - len(expected) < size
