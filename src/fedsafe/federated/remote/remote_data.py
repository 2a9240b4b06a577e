"""`RemoteData`: the data of a server whose clients keep theirs on their own machines."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.data.tokens import TokenStore
from fedsafe.federated.partition import Partition, PartitionRow

_TOKENS = {"input_ids": datasets.List(datasets.Value("int32"))}
_TOKENS["answer_mask"] = datasets.List(datasets.Value("uint8"))


class RemoteData(FederatedDataModule):
    """No conversations: a tokenizer, what the server itself trains on, and the clients' counts.

    Takes the settings of `FederatedDataModule`; those that are about the clients' conversations
    (`path`, `partition`, `filter`) have no effect here.
    """

    @property
    def partition(self) -> Partition:
        """Nobody, until a round begins and it is known who is there."""
        return Partition(np.zeros(0, np.int64), np.zeros(1, np.int64), ())

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that is the server's own."""
        return max([1, *(each.longest for each in self.cai.stores)] if self.cai else [1])

    def client_rows(self) -> list[PartitionRow]:
        """None: nobody is here."""
        return []

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it resumes; not who is there."""
        return {
            "data.validation_share": self.validation_share,
            "data.batch_size": self.batch_size,
            "data.max_length": self.max_length,
            "data.seed": self.seed,
            **(self.cai.identity() if self.cai is not None else {}),
        }

    def setup(self, stage: str) -> None:
        """Load the tokenizer, and the server's own data."""
        self._read_for(stage)

    def val_dataloader(self) -> Any:
        """Nothing, but not an absence: callbacks that look at the adapter are called."""
        return _Nothing()

    def _load(self) -> None:
        if self._tokenizer is not None:
            return
        if self.train_tokenizer is not None:
            raise ValueError(
                f"train_tokenizer is {self.train_tokenizer}; it is trained on conversations, which "
                "stay with the clients: give data.tokenizer, or a base that has one"
            )
        self.num_workers = 0  # there is nothing to prepare
        rejected = self._forget_rejected()
        self._tokenizer = self._make_tokenizer(iter(()))
        if self.cai is not None:
            self.cai.load(self.tokenizer, rejected=rejected)
        empty = datasets.Dataset.from_dict(
            {name: [] for name in _TOKENS}, features=datasets.Features(_TOKENS)
        )
        self._store = TokenStore(empty)


class _Nothing:
    """A loader that has a length, so that validation takes place, and no batch."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter(())
