import numpy as np
import pytest
import torch

from fedsafe.data.packing import (
    PreferenceBatch,
    TrainingBatch,
    count_targets,
    pack,
    pack_batch,
    split_by_budget,
)
from fedsafe.federated.schedule import BatchKey

Sample = tuple[np.ndarray, np.ndarray]


def sample(ids: list[int], answers: list[int]) -> Sample:
    return np.array(ids, dtype=np.int32), np.array(answers, dtype=np.bool_)


SAMPLES = [
    sample([10, 11, 12, 13], [0, 0, 1, 1]),
    sample([20, 21], [0, 1]),
    sample([30, 31, 32], [1, 1, 0]),
]


def key_of(samples: list[int], step_samples: list[int]) -> BatchKey:
    return BatchKey(
        round=0,
        num_rounds=1,
        visit=0,
        client=0,
        step=0,
        num_steps=1,
        micro=0,
        num_micro=2,
        samples=np.array(samples, dtype=np.int64),
        step_samples=np.array(step_samples, dtype=np.int64),
    )


def test_samples_lie_end_to_end() -> None:
    packed = pack(SAMPLES)
    assert packed.input_ids.tolist() == [[10, 11, 12, 13, 20, 21, 30, 31, 32]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert packed.segment_lengths == [4, 2, 3]
    assert packed.input_ids.dtype == packed.position_ids.dtype == torch.int64


def test_every_answer_token_but_a_samples_first_is_predicted_by_the_one_before() -> None:
    packed = pack(SAMPLES)
    assert packed.targets.tolist() == [12, 13, 21, 31]
    assert packed.predictors.tolist() == [1, 2, 4, 6]
    assert packed.target_counts == [2, 1, 1]
    following = packed.input_ids[0, packed.predictors + 1]
    assert torch.equal(following, packed.targets)


def test_the_samples_stay_as_they_were() -> None:
    before = [(ids.copy(), mask.copy()) for ids, mask in SAMPLES]
    packed = pack(SAMPLES)
    packed.input_ids.zero_()
    for (ids, mask), (old_ids, old_mask) in zip(SAMPLES, before, strict=True):
        assert np.array_equal(ids, old_ids)
        assert np.array_equal(mask, old_mask)


def test_no_samples_make_a_token_without_a_loss() -> None:
    packed = pack([])
    assert packed.input_ids.shape == packed.position_ids.shape == (1, 1)
    assert packed.segment_lengths == [1]
    assert len(packed.predictors) == len(packed.targets) == 0
    assert packed.target_counts == [0]


def test_a_part_of_a_step_is_normalised_by_the_whole_step() -> None:
    batch = pack_batch(SAMPLES, key_of([1], step_samples=[0, 1, 2]))  # type: ignore[arg-type]
    assert isinstance(batch, TrainingBatch)
    assert batch.input_ids.tolist() == [[20, 21]]
    assert batch.normalizer == 4
    assert [count_targets(SAMPLES, i) for i in range(3)] == [2, 1, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize("num_micro", [1, 2])
def test_a_step_without_samples_is_divided_by_one(num_micro: int) -> None:
    key = key_of([], step_samples=[])._replace(num_micro=num_micro)
    batch = pack_batch(SAMPLES, key)  # type: ignore[arg-type]
    assert batch.target_counts == [0]
    assert batch.normalizer == 1


def test_a_preference_batch_takes_its_reference_to_the_device_along() -> None:
    batch = PreferenceBatch(
        **vars(pack(SAMPLES[:2])),
        reference=torch.zeros(2),
        num_pairs=1,
        num_chosen_tokens=2,
        beta=0.1,
        nll_weight=0.0,
    )
    elsewhere = batch.to(torch.device("meta"))
    assert isinstance(elsewhere, PreferenceBatch)
    assert elsewhere.reference.is_meta
    assert elsewhere.input_ids.is_meta
    assert elsewhere.target_counts == [2, 1]


@pytest.mark.parametrize("max_tokens", [1, 10, 33, 1000])
def test_groups_hold_every_sample_once_within_the_budget(max_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, size=60).astype(np.int32)
    groups = split_by_budget(lengths, max_tokens=max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(60))
    for group in groups:
        assert len(group) == 1 or lengths[group].sum() <= max_tokens
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)


def test_groups_are_filled_before_another_begins() -> None:
    lengths = np.array([2, 5, 3, 4], dtype=np.int32)
    assert split_by_budget(lengths, max_tokens=9) == [[1, 3], [2, 0]]
    assert split_by_budget(np.zeros(0, dtype=np.int32), max_tokens=9) == []


@pytest.mark.parametrize("max_tokens", [1, 39, 100, 1000])
def test_padding_counts_where_groups_are_padded(max_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, size=60).astype(np.int32)
    groups = split_by_budget(lengths, max_tokens=max_tokens, padded=True)
    assert sorted(i for group in groups for i in group) == list(range(60))
    for group in groups:
        assert len(group) == 1 or lengths[group].max() * len(group) <= max_tokens
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)


def test_padded_groups_are_filled_before_another_begins() -> None:
    lengths = np.array([2, 5, 3, 4, 1], dtype=np.int32)
    assert split_by_budget(lengths, max_tokens=9, padded=True) == [[1], [3, 2], [0, 4]]
    assert split_by_budget(lengths, max_tokens=15, padded=True) == [[1, 3, 2], [0, 4]]
    assert split_by_budget(lengths, max_tokens=9) == [[1, 3], [2, 0, 4]]
    assert split_by_budget(np.zeros(0, dtype=np.int32), max_tokens=9, padded=True) == []
