"""Tokenised samples over clients."""

from collections.abc import Sequence
from dataclasses import replace
from warnings import warn

import datasets
import numpy as np
from numpy.typing import NDArray

from fedsafe.federated.partition import Natural, Partition, Partitioner, SampleColumns

_CLIENTS_NAMED = 10


def split_over_clients(
    tokens: datasets.Dataset, train: NDArray[np.int64], partitioner: Partitioner, *, seed: int
) -> Partition:
    """Give each row of `train` a client.

    Args:
        tokens: As `data.tokens.tokenize_samples` makes them.
        train: Rows that are not held out.
        partitioner: How they are split.
        seed: Seed of the split.
    """
    part = tokens.select(train)
    if isinstance(partitioner, Natural):
        _warn_of_lost_clients(tokens["client"], part["client"])
    columns = SampleColumns(len(train), part["client"], part["label"], part["category"])
    partition = partitioner(columns, seed=seed)
    return replace(partition, order=train[partition.order])


def _warn_of_lost_clients(before: Sequence[str | None], after: Sequence[str | None]) -> None:
    lost = sorted({str(name) for name in before} - {str(name) for name in after})
    if lost:
        named = ", ".join(lost[:_CLIENTS_NAMED]) + (", ..." if len(lost) > _CLIENTS_NAMED else "")
        warn(
            f"{len(lost)} clients take no part, all of their samples are held out for validation: "
            f"{named}; lower validation_share to keep them",
            stacklevel=2,
        )
