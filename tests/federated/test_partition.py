import re
import subprocess
import sys
import time

import numpy as np
import pytest

from fedsafe.federated.partition import (
    IID,
    Dirichlet,
    Natural,
    NumberedNames,
    Partition,
    Partitioner,
    PartitionRow,
    Quantity,
    SampleColumns,
    partition_rows,
    validation_split,
)


def columns(num_samples: int, num_categories: int = 4) -> SampleColumns:
    numbers = range(num_samples)
    return SampleColumns(
        num_samples,
        client=[f"hospital-{i % 3}" for i in numbers],
        label=["unsafe" if i % 5 == 0 else "safe" for i in numbers],
        category=[f"topic-{i % num_categories}" for i in numbers],
    )


def category_shares(partition: Partition, num_categories: int) -> np.ndarray:
    """Share of each client's samples in each category, shape (clients, categories)."""
    counts = [
        np.bincount(partition.samples_of(k) % num_categories, minlength=num_categories)
        for k in range(len(partition))
    ]
    return np.array(counts) / partition.sizes[:, None]


PARTITIONERS = [
    IID(7),
    Dirichlet(7, alpha=0.05),
    Dirichlet(7, alpha=1.0, by="label"),
    Dirichlet(7, alpha=0.01, min_samples=5),
    Dirichlet(7, alpha=1000.0),
    Quantity(7, sigma=0.0),
    Quantity(7, sigma=3.0),
    Natural(),
]


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=lambda p: f"{type(p).__name__}")
def test_every_sample_has_one_client_and_every_client_a_sample(partitioner: Partitioner) -> None:
    for seed in range(40):
        num_samples = 35 + 13 * seed
        partition = partitioner(columns(num_samples), seed=seed)
        assert sorted(partition.order.tolist()) == list(range(num_samples))
        assert partition.sizes.min() >= getattr(partitioner, "min_samples", 1)
        assert partition.sizes.sum() == num_samples
        assert len(partition.names) == len(partition) == len(partition.sizes)
        for k in range(len(partition)):
            assert (np.diff(partition.samples_of(k)) > 0).all()


@pytest.mark.parametrize("partitioner", PARTITIONERS[:-1], ids=lambda p: f"{type(p).__name__}")
def test_the_seed_alone_decides_the_partition(partitioner: Partitioner) -> None:
    first = partitioner(columns(100), seed=3)
    np.random.default_rng().random(17)
    again = partitioner(columns(100), seed=3)
    other = partitioner(columns(100), seed=4)
    assert first.digest() == again.digest()
    assert first.digest() != other.digest()


def test_a_partition_is_the_same_in_another_process() -> None:
    code = (
        "from fedsafe.federated.partition import *;"
        "c = SampleColumns(50, category=[str(i % 3) for i in range(50)]);"
        "print(Dirichlet(5, alpha=0.3)(c, seed=1).digest())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    here = SampleColumns(50, category=[str(i % 3) for i in range(50)])
    assert printed.stdout.strip() == Dirichlet(5, alpha=0.3)(here, seed=1).digest()


def test_importing_the_partition_loads_no_deep_learning_library() -> None:
    code = (
        "import sys, fedsafe.federated.partition;"
        "print([m for m in ('torch', 'lightning', 'transformers', 'peft') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def test_iid_sizes_differ_by_one_at_most() -> None:
    partition = IID(7)(columns(100), seed=0)
    assert sorted(partition.sizes.tolist()) == [14, 14, 14, 14, 14, 15, 15]


def test_iid_clients_have_the_mix_of_the_whole() -> None:
    shares = category_shares(IID(5)(columns(20_000), seed=0), 4)
    # Each share is a mean of 4,000 draws: standard deviation 0.007.
    np.testing.assert_allclose(shares, 0.25, atol=0.03)


def test_a_small_alpha_gives_clients_few_categories_and_a_large_one_the_mix_of_all() -> None:
    uneven = category_shares(Dirichlet(10, alpha=0.05)(columns(8_000), seed=0), 4)
    even = category_shares(Dirichlet(10, alpha=1_000.0)(columns(8_000), seed=0), 4)
    assert uneven.max(axis=1).mean() > 0.7
    np.testing.assert_allclose(even, 0.25, atol=0.07)


def test_the_largest_share_falls_as_alpha_rises() -> None:
    def largest(alpha: float) -> float:
        partitions = [Dirichlet(8, alpha=alpha)(columns(2_000), seed=seed) for seed in range(20)]
        return float(np.mean([category_shares(each, 4).max(axis=1).mean() for each in partitions]))

    shares = [largest(alpha) for alpha in (0.05, 0.3, 1.0, 10.0, 1_000.0)]
    assert shares == sorted(shares, reverse=True)


def test_dirichlet_shares_of_a_category_have_the_mean_and_spread_of_the_distribution() -> None:
    num_clients, alpha, num_samples = 5, 2.0, 1_000
    one_category = SampleColumns(num_samples, category=["a"] * num_samples)
    shares = np.array(
        [
            Dirichlet(num_clients, alpha=alpha)(one_category, seed=seed).sizes / num_samples
            for seed in range(400)
        ]
    )
    mean = 1 / num_clients
    # Var = m (1 - m) / (K alpha + 1), plus the multinomial draw's part.
    variance = mean * (1 - mean) / (num_clients * alpha + 1)
    variance += (mean * (1 - mean) - variance) / num_samples
    np.testing.assert_allclose(shares.mean(axis=0), mean, atol=0.02)
    np.testing.assert_allclose(shares.var(axis=0).mean(), variance, rtol=0.1)


def test_dirichlet_by_label_spreads_labels_and_leaves_categories_even() -> None:
    partition = Dirichlet(4, alpha=0.05, by="label")(columns(20_000, num_categories=4), seed=1)
    unsafe = [(partition.samples_of(k) % 5 == 0).mean() for k in range(4)]
    assert max(unsafe) - min(unsafe) > 0.2
    large = partition.sizes > 1_000
    np.testing.assert_allclose(category_shares(partition, 4)[large], 0.25, atol=0.05)


def test_dirichlet_with_as_many_clients_as_samples_gives_one_each() -> None:
    partition = Dirichlet(50, alpha=0.01)(columns(50), seed=0)
    assert partition.sizes.tolist() == [1] * 50


def test_topping_up_moves_no_more_samples_than_needed() -> None:
    loose = Dirichlet(10, alpha=0.1)(columns(1_000), seed=0)
    firm = Dirichlet(10, alpha=0.1, min_samples=30)(columns(1_000), seed=0)
    short = np.maximum(30 - loose.sizes, 0)
    assert short.sum() > 0
    assert firm.sizes[short > 0].tolist() == [30] * int((short > 0).sum())
    moved = np.maximum(loose.sizes - firm.sizes, 0).sum()
    assert moved == short.sum()


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_quantity_sizes_have_the_log_normal_spread(sigma: float) -> None:
    logs = [
        np.log(Quantity(50, sigma=sigma)(SampleColumns(50_000), seed=seed).sizes)
        for seed in range(40)
    ]
    spread = np.sqrt(np.mean([each.var(ddof=1) for each in logs]))
    assert spread == pytest.approx(sigma, rel=0.06)


def test_quantity_with_sigma_zero_gives_equal_sizes() -> None:
    assert Quantity(4, sigma=0.0)(SampleColumns(40), seed=0).sizes.tolist() == [10] * 4


def test_natural_keeps_samples_with_their_client() -> None:
    partition = Natural()(SampleColumns(5, client=["b", "a", "b", "c", "a"]), seed=0)
    assert list(partition.names) == ["a", "b", "c"]
    assert [partition.samples_of(k).tolist() for k in range(3)] == [[1, 4], [0, 2], [3]]


def test_a_million_samples_are_split_over_a_million_clients_in_seconds() -> None:
    num = 1_000_000
    category = np.char.mod("%d", np.arange(num) % 14)
    everything = SampleColumns(num, category=category)  # type: ignore[arg-type]
    started = time.perf_counter()
    for partitioner in (IID(num), Quantity(num // 2)):
        assert partitioner(everything, seed=0).sizes.min() >= 1
    assert time.perf_counter() - started < 10
    partition = IID(num)(everything, seed=0)
    assert partition.names[999_999] == "client-999999"
    assert isinstance(partition.names, NumberedNames)


@pytest.mark.slow
def test_dirichlet_over_a_million_clients_takes_seconds() -> None:
    num = 1_000_000
    category = np.char.mod("%d", np.arange(num) % 14)
    started = time.perf_counter()
    partition = Dirichlet(num // 2, alpha=0.1)(
        SampleColumns(num, category=category),  # type: ignore[arg-type]
        seed=0,
    )
    assert partition.sizes.min() >= 1
    assert time.perf_counter() - started < 20


def test_samples_of_is_a_view() -> None:
    partition = IID(3)(SampleColumns(9), seed=0)
    assert np.shares_memory(partition.samples_of(1), partition.order)


def test_numbered_names_are_a_sequence() -> None:
    names = NumberedNames(3)
    assert list(names) == ["client-0", "client-1", "client-2"]
    assert names[-1] == "client-2"
    assert names[1:] == ["client-1", "client-2"]
    assert "client-1" in names


def test_the_digest_sees_the_order_the_offsets_and_the_names() -> None:
    order = np.array([0, 1, 2])
    digests = {
        Partition(order, np.array([0, 1, 3]), ("a", "b")).digest(),
        Partition(order, np.array([0, 2, 3]), ("a", "b")).digest(),
        Partition(order[::-1].copy(), np.array([0, 1, 3]), ("a", "b")).digest(),
        Partition(order, np.array([0, 1, 3]), ("a", "c")).digest(),
        Partition(order, np.array([0, 1, 3]), NumberedNames(2)).digest(),
    }
    assert len(digests) == 5


def test_rows_count_samples_tokens_and_the_harmful_share_of_labelled_samples() -> None:
    partition = Natural()(SampleColumns(5, client=["b", "a", "b", "c", "a"]), seed=0)
    lengths = np.array([1, 10, 100, 1_000, 10_000], dtype=np.int32)
    labels = ["unsafe", "safe", None, None, "unsafe"]
    assert partition_rows(partition, lengths=lengths, labels=labels) == [
        PartitionRow("a", 2, 10_010, 0.5),
        PartitionRow("b", 2, 101, 1.0),
        PartitionRow("c", 1, 1_000, None),
    ]


def test_rows_without_labels_have_no_harmful_share() -> None:
    partition = IID(2)(SampleColumns(4), seed=0)
    rows = partition_rows(partition, lengths=np.ones(4, dtype=np.int32))
    assert [row.harmful_share for row in rows] == [None, None]


def test_rows_of_tokens_do_not_overflow_32_bits() -> None:
    partition = IID(1)(SampleColumns(2), seed=0)
    lengths = np.full(2, 2**31 - 1, dtype=np.int32)
    assert partition_rows(partition, lengths=lengths)[0].tokens == 2 * (2**31 - 1)


def test_samples_are_renumbered_and_left_out_client_by_client() -> None:
    partition = Partition(np.array([0, 3, 1, 2, 4]), np.array([0, 2, 3, 5]), NumberedNames(3))
    new = np.array([0, -1, 2, 7, -1])
    after = partition.renumbered(new)
    assert [after.samples_of(k).tolist() for k in range(3)] == [[0, 7], [], [2]]
    assert after.num_holding == 2
    assert partition.renumbered(np.arange(5)).digest() == partition.digest()
    assert after.sums(np.arange(8)).tolist() == [7, 0, 2]


def test_rows_of_clients_without_samples_are_zero_wherever_they_stand() -> None:
    offsets = np.array([0, 0, 2, 2, 3, 3])
    partition = Partition(np.array([2, 0, 1]), offsets, NumberedNames(5))
    labels = ["unsafe", "safe", None]
    rows = partition_rows(partition, lengths=np.array([1, 10, 100]), labels=labels)
    assert [row.tokens for row in rows] == [0, 101, 0, 10, 0]
    assert [row.harmful_share for row in rows] == [None, 1.0, None, 0.0, None]


@pytest.mark.parametrize("seed", range(10))
def test_the_validation_split_takes_its_share_and_loses_nothing(seed: int) -> None:
    train, val = validation_split(100, share=0.13, seed=seed)
    assert len(val) == 13
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(100))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    assert train.dtype == val.dtype == np.int64
    again = validation_split(100, share=0.13, seed=seed)
    assert (again[1] == val).all()


def test_validation_splits_of_two_seeds_differ() -> None:
    first = validation_split(100, share=0.2, seed=0)[1]
    assert first.tolist() != validation_split(100, share=0.2, seed=1)[1].tolist()


def test_a_validation_share_of_zero_keeps_all_for_training() -> None:
    train, val = validation_split(5, share=0.0, seed=0)
    assert train.tolist() == [0, 1, 2, 3, 4]
    assert val.tolist() == []


@pytest.mark.parametrize("share", [-0.1, 1.0, 20.0, float("nan")])
def test_a_validation_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"validation share is {share}; give a number from 0"):
        validation_split(10, share=share, seed=0)


@pytest.mark.parametrize(("num_samples", "share"), [(3, 0.1), (3, 0.9), (0, 0.0)])
def test_a_validation_share_that_empties_a_side_is_refused(num_samples: int, share: float) -> None:
    with pytest.raises(ValueError, match=f"share of {share} of {num_samples} samples gives"):
        validation_split(num_samples, share=share, seed=0)


@pytest.mark.parametrize("partitioner", [IID(11), Dirichlet(11), Quantity(11)])
def test_more_clients_than_samples_are_refused_with_both_numbers(partitioner: Partitioner) -> None:
    with pytest.raises(ValueError, match=r"11 clients .* need 11 samples, and there are 10"):
        partitioner(columns(10), seed=0)


def test_a_minimum_that_the_samples_cannot_give_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 clients with at least 4 .* need 12 samples.* are 10"):
        Dirichlet(3, min_samples=4)(columns(10), seed=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e308, float("nan")])
def test_an_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"alpha is {re.escape(str(alpha))}; give a number above 0, at most 1e\+09",
    ):
        Dirichlet(3, alpha=alpha)


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf")])
def test_a_sigma_that_is_negative_or_not_finite_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match=f"sigma is {sigma}; give a finite number from 0"):
        Quantity(3, sigma=sigma)


@pytest.mark.parametrize("make", [IID, Dirichlet, Quantity])
def test_no_clients_are_refused(make: type[IID]) -> None:
    with pytest.raises(ValueError, match="num_clients is 0; give a whole number from 1"):
        make(0)


def test_a_minimum_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="min_samples is 0; give a whole number from 1"):
        Dirichlet(2, min_samples=0)


@pytest.mark.parametrize("by", ["category", "label"])
def test_dirichlet_without_its_column_is_refused(by: str) -> None:
    with pytest.raises(ValueError, match=f"every row is without a `{by}`, which the Dirichlet"):
        Dirichlet(2, by=by)(SampleColumns(4), seed=0)  # type: ignore[arg-type]


def test_gaps_in_the_column_are_refused_with_their_count() -> None:
    with pytest.raises(ValueError, match="2 of 4 rows are without a `category`"):
        Dirichlet(2)(SampleColumns(4, category=["a", None, "b", None]), seed=0)


def test_natural_without_clients_is_refused_with_the_count() -> None:
    with pytest.raises(ValueError, match="every row is without a `client`, which the Natural"):
        Natural()(SampleColumns(4), seed=0)
    with pytest.raises(ValueError, match="1 of 3 rows are without a `client`"):
        Natural()(SampleColumns(3, client=["a", None, "b"]), seed=0)


@pytest.mark.parametrize("client", [-1, 3])
def test_a_client_that_does_not_exist_is_refused(client: int) -> None:
    with pytest.raises(IndexError, match=f"no client {client}: .* clients 0 to 2"):
        IID(3)(SampleColumns(9), seed=0).samples_of(client)


def test_constructor_arguments_have_help_texts() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(Dirichlet, "partition")
    text = parser.format_help()
    assert "Concentration, above 0" in text
    assert "Least number of samples of a client" in text
