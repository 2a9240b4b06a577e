"""`OwnData`: one client's conversations on its own machine, and the batches of a visit to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import DataLoader

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.data.packing import TrainingBatch
from fedsafe.federated.partition import NumberedNames, Partition, Partitioner, SampleColumns
from fedsafe.federated.schedule import Schedule, Visit
from fedsafe.federated.sharing import Share
from fedsafe.strategies.layout import ONE_RANK, Layout

_SHOWN = 10


class OwnData(FederatedDataModule):
    """The data module of a node: everything is its own client's.

    Rows with a `client` field are this client's where the field holds its name; others' are left
    out before anything else looks at them. What only the server has (prompts of the constitution,
    benchmarks) is not needed.

    Args:
        client: Name of the client.
        folder: Where the filter's verdicts and `rejected.jsonl` go; None writes none.
        settings: As of `FederatedDataModule`.

    Raises:
        ValueError: If no tokenizer is given, or each node would train one of its own.
    """

    def __init__(self, client: str, *, folder: Path | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if self.train_tokenizer is not None:
            raise ValueError(
                f"train_tokenizer is {self.train_tokenizer}, and each node would train a "
                "vocabulary of its own; train one, and give its folder as data.tokenizer"
            )
        self.partitioner, self.cai = _AllMine(client), None
        self.client = client
        self.layout = ONE_RANK
        """The ranks that train the client together."""
        self._folder = folder

    def setup(self, stage: str) -> None:
        """Read and filter; write down what the filter did."""
        super().setup(stage)
        if self._folder is not None and self.layout.world.index == 0:
            self.write_verdicts(self._folder)

    @property
    def num_samples(self) -> int:
        """Samples to train on, after the filter and without those held out."""
        return len(self.partition.order)

    @property
    def num_answer_tokens(self) -> int:
        """Answer tokens of those."""
        return int(self.store.answer_counts[self.partition.order].sum())

    def batches(
        self,
        *,
        round_: int,
        num_rounds: int,
        number: int,
        client: int,
        local_steps: int | None,
        local_epochs: int | None,
        num_micro: int,
        seed: int,
    ) -> DataLoader[TrainingBatch]:
        """The batches of one visit, as the same client of a simulated federation has them.

        Args:
            round_: Round, from 0.
            num_rounds: Rounds of the run.
            number: Place of the visit among those of the round, from 0.
            client: Number of the client in the federation, from 0.
            local_steps: Optimizer steps, or None.
            local_epochs: Passes over the samples, or None.
            num_micro: Parts that each step is split into.
            seed: Seed of the order.
        """
        ranks = self.layout.data
        self.schedule = Schedule(
            partition=self._numbered(client),
            num_rounds=num_rounds,
            clients_per_round=1,
            batch_size=self.batch_size,
            local_steps=local_steps,
            local_epochs=local_epochs,
            num_micro=num_micro,
            seed=seed,
            share=Share(rank=ranks.index, num_ranks=ranks.size),
        )
        steps = self.schedule.num_steps(client)
        return self.client_dataloader(Visit(round_, number, client, steps, failed=False))

    def counts(self) -> dict[str, int]:
        """What the filter did, in numbers; empty without one."""
        report = self.filter_report
        if report is None:
            return {}
        counts = report.total._asdict()
        del counts["client"]
        return {**counts, "shortened": report.num_shortened, "unjudged": report.num_unjudged}

    def _numbered(self, client: int) -> Partition:
        """Everything is client number `client`'s; those before it hold nothing."""
        mine = self.partition
        offsets = np.zeros(client + 2, dtype=np.int64)
        offsets[-1] = len(mine.order)
        return Partition(mine.order, offsets, NumberedNames(client + 1))

    @property
    def _layout(self) -> Layout:
        return self.layout

    def _read(self, path: str | list[str]) -> datasets.Dataset:
        samples = super()._read(path)
        owners = samples["client"][:]
        named = {owner for owner in owners if owner is not None}
        if not named:
            return samples
        mine = [row for row, owner in enumerate(owners) if owner == self.client]
        if not mine or None in owners:
            raise ValueError(_not_mine(path, self.client, owners, sorted(named)))
        return samples.select(mine)

    def _rejected_file(self) -> Path | None:
        if self._folder is None or self.layout.world.index > 0:
            return None
        return self._folder / self._rejected_name


class _AllMine(Partitioner):
    """One client has all samples, in the order of the file."""

    def __init__(self, client: str) -> None:
        self.client = client

    def __call__(self, columns: SampleColumns, *, seed: int) -> Partition:
        everything = np.arange(columns.num_samples)
        return Partition(everything, np.array([0, len(everything)]), (self.client,))


def _not_mine(
    path: str | list[str], client: str, owners: Sequence[str | None], named: Sequence[str]
) -> str:
    missing = sum(owner is None for owner in owners)
    if missing:
        return (
            f"{missing} of {len(owners)} rows of {path} are without a `client`, and others have "
            "one; give all of them the field, or none"
        )
    shown = ", ".join(named[:_SHOWN]) + (", ..." if len(named) > _SHOWN else "")
    return (
        f"no row of {path} is of client {client!r}, they are of {shown}; start the node with "
        "another --name, give its own file as data.path, or leave the field `client` out"
    )
