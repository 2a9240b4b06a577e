"""Samples end to end in one row: no padding, and no sample sees another.

The boundaries travel with the batch as segment lengths; `model.attention` attends within segments,
so the cost is linear in the number of samples and nothing depends on a mask being detected
somewhere.

Shapes: T tokens of the pack, N tokens with a loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsafe.data.tokens import TokenStore
from fedsafe.federated.schedule import BatchKey


@dataclass
class Pack:
    """Samples laid end to end.

    Attributes:
        input_ids: Token ids, shape ``(1, T)``, int64.
        position_ids: Position inside the sample, from 0, shape ``(1, T)``, int64.
        segment_lengths: Tokens of each sample, in order; they sum to T.
        predictors: Positions whose next token the loss is computed on, shape ``(N,)``, int64.
        targets: Those next tokens, shape ``(N,)``, int64.
        target_counts: Number of targets of each sample, in order; they sum to N.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_lengths: list[int]
    predictors: Tensor
    targets: Tensor
    target_counts: list[int]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same pack with its tensors on `device`; Lightning calls this for each batch."""
        if self.input_ids.device == device:
            return self
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            position_ids=self.position_ids.to(device, non_blocking=non_blocking),
            predictors=self.predictors.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
        )


@dataclass
class SupervisedBatch(Pack):
    """A pack to train on.

    Attributes:
        normalizer: Answer tokens of the whole optimizer step; the step's loss is the sum over them,
            divided by it.
    """

    normalizer: int


@dataclass
class TrainingBatch(SupervisedBatch):
    """A pack of a client's samples and its place in the run.

    Attributes:
        key: Round, visit, client and step.
    """

    key: BatchKey


@dataclass
class PreferenceBatch(Pack):
    """Better and worse answers to the same prompts, laid end to end: chosen, rejected, chosen, ...

    Attributes:
        reference: Log-probability of each answer under the reference adapter, summed over its
            tokens, nats, shape ``(2P,)``, float32, in the order of the segments.
        num_pairs: Pairs of the whole optimizer step; the step's loss is the mean over them.
        num_chosen_tokens: Tokens of the chosen answers of the whole optimizer step.
        beta: Strength of the pull to the reference, > 0.
        nll_weight: Weight of the chosen answers' mean negative log-likelihood in the loss, >= 0.
    """

    reference: Tensor
    num_pairs: int
    num_chosen_tokens: int
    beta: float
    nll_weight: float

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same batch with its tensors on `device`."""
        moved = super().to(device, non_blocking=non_blocking)
        return replace(moved, reference=self.reference.to(device, non_blocking=non_blocking))


def pack(samples: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]]) -> Pack:
    """Lay samples end to end.

    Args:
        samples: ``(input_ids, answer_mask)`` of each sample. None at all gives a pack of one token
            without a loss, so that every part of a step has a forward and a backward pass.
    """
    if not samples:
        samples = [(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.bool_))]
    lengths = [len(ids) for ids, _ in samples]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.concatenate([ids for ids, _ in samples]).astype(np.int64)
    mask = np.concatenate([answers for _, answers in samples])
    mask[starts] = False  # nothing predicts a sample's first token
    targets = np.flatnonzero(mask)
    return Pack(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(starts, lengths))[None],
        segment_lengths=lengths,
        predictors=torch.from_numpy(targets - 1),
        targets=torch.from_numpy(ids[targets]),
        target_counts=np.add.reduceat(mask.astype(np.int64), starts).tolist(),
    )


def pack_batch(store: TokenStore, key: BatchKey) -> TrainingBatch:
    """The training batch for `key`; without a sample its loss is 0, and so are its gradients."""
    packed = pack([store[index] for index in key.samples.tolist()])
    normalizer = sum(packed.target_counts)
    if key.num_parts > 1:
        normalizer = sum(count_targets(store, index) for index in key.step_samples.tolist())
    return TrainingBatch(**vars(packed), key=key, normalizer=max(1, normalizer))


def count_targets(store: TokenStore, index: int) -> int:
    """Tokens of one sample that the loss is computed on."""
    return int(np.count_nonzero(store[index][1][1:]))


def split_by_budget(
    lengths: NDArray[np.int32], *, max_tokens: int, padded: bool = False
) -> list[list[int]]:
    """Group samples, longest first, into groups of at most `max_tokens` tokens.

    A longer sample is a group of its own. Sorting puts samples of one length together, so that a
    group's cost is close to its number of tokens.

    Args:
        lengths: Tokens of each sample, shape ``(num_samples,)``.
        max_tokens: Tokens of a group.
        padded: Whether the samples of a group are padded to its longest, and the padding counts.
    """
    groups: list[list[int]] = []
    room = longest = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if not groups or (longest if padded else length) > room:
            groups.append([])
            room = max_tokens
            longest = length
        groups[-1].append(index)
        room -= longest if padded else length
    return groups
