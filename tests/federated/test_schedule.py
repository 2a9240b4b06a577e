import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from fedsafe.federated.partition import NumberedNames, Partition
from fedsafe.federated.schedule import BatchKey, Schedule, Visit
from fedsafe.federated.sharing import Share

SIZES = (9, 4, 7, 1, 6)


def partition_of(sizes: tuple[int, ...] = SIZES) -> Partition:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Partition(np.arange(offsets[-1]) + 100, offsets, NumberedNames(len(sizes)))


def make_schedule(**settings: object) -> Schedule:
    defaults = {"num_rounds": 3, "clients_per_round": 3, "batch_size": 3, "local_steps": 4}
    if "local_epochs" in settings:
        del defaults["local_steps"]
    return Schedule(partition_of(), **(defaults | settings))  # type: ignore[arg-type]


def visit_to(client: int, schedule: Schedule, *, round_: int = 0) -> Visit:
    return Visit(round_, 0, client, schedule.num_steps(client), failed=False)


def plain(key: BatchKey) -> tuple[object, ...]:
    return tuple(x.tolist() if isinstance(x, np.ndarray) else x for x in key)


def plain_batches(schedule: Schedule, round_: int, start: int = 0) -> list[tuple[object, ...]]:
    return [plain(key) for key in schedule.plan(round_).batches(start=start)]


def test_a_plan_does_not_depend_on_earlier_draws() -> None:
    later = plain_batches(make_schedule(), round_=2)
    schedule = make_schedule()
    for round_ in (0, 1, 0, 2, 1):
        np.random.default_rng(0).random()
        batches = plain_batches(schedule, round_)
    assert plain_batches(schedule, round_=2) == later
    assert batches != later


@pytest.mark.parametrize("settings", [{"local_steps": 5}, {"local_epochs": 2, "num_micro": 2}])
def test_batches_from_n_on_are_the_last_ones_of_all(settings: dict[str, int]) -> None:
    schedule = make_schedule(**settings)
    batches = plain_batches(schedule, round_=1)
    assert len(batches) == len(schedule.plan(1))
    for start in range(len(batches) + 1):
        assert plain_batches(schedule, round_=1, start=start) == batches[start:]


def test_another_seed_or_round_gives_another_order() -> None:
    def order(seed: int, round_: int) -> list[int]:
        schedule = make_schedule(seed=seed, local_epochs=1)
        visit = visit_to(0, schedule, round_=round_)
        return [i for key in schedule.batches_of(visit) for i in key.samples.tolist()]

    first = order(0, 0)
    assert order(1, 0) != first
    assert order(0, 1) != first
    assert sorted(order(1, 0)) == sorted(first)


@pytest.mark.parametrize("client", range(len(SIZES)))
def test_local_epochs_cover_every_sample_once_each(client: int) -> None:
    schedule = make_schedule(local_epochs=3)
    batches = list(schedule.batches_of(visit_to(client, schedule)))
    steps_per_epoch = -(-SIZES[client] // 3)
    assert len(batches) == 3 * steps_per_epoch
    own = schedule.partition.samples_of(client).tolist()
    epochs = []
    for epoch in range(3):
        passes = batches[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        seen = [i for key in passes for i in key.samples.tolist()]
        assert sorted(seen) == own
        epochs.append(seen)
    assert SIZES[client] == 1 or len({tuple(seen) for seen in epochs}) > 1, "never reshuffled"


@pytest.mark.parametrize("client", range(len(SIZES)))
def test_local_steps_fill_every_batch_from_reshuffled_passes(client: int) -> None:
    schedule = make_schedule(local_steps=12)
    batches = list(schedule.batches_of(visit_to(client, schedule)))
    assert [len(key.samples) for key in batches] == [3] * 12
    stream = [i for key in batches for i in key.samples.tolist()]
    own = schedule.partition.samples_of(client).tolist()
    passes = [stream[i : i + len(own)] for i in range(0, len(stream) - len(own) + 1, len(own))]
    assert all(sorted(each) == own for each in passes)
    assert len(own) == 1 or len({tuple(each) for each in passes}) > 1, "never reshuffled"


def test_the_parts_of_a_step_make_up_the_step() -> None:
    whole = list(make_schedule(local_epochs=1).plan(0).batches())
    parts = list(make_schedule(local_epochs=1, num_micro=4).plan(0).batches())
    assert len(parts) == 4 * len(whole)
    for number, key in enumerate(whole):
        group = parts[4 * number : 4 * number + 4]
        assert [part.micro for part in group] == [0, 1, 2, 3]
        joined = sorted(i for part in group for i in part.samples.tolist())
        assert joined == sorted(key.samples.tolist())
        assert all(np.array_equal(part.step_samples, key.samples) for part in group)
        assert len(group[3].samples) == 0, "three samples at most leave the fourth part empty"


@pytest.mark.parametrize("num_micro", [1, 2])
def test_a_visit_begins_and_ends_once(num_micro: int) -> None:
    plan = make_schedule(num_micro=num_micro).plan(0)
    keys = list(plan.batches())
    for visit in plan.visits:
        own = [key for key in keys if key.visit == visit.number]
        assert [key.starts_visit for key in own] == [True] + [False] * (4 * num_micro - 1)
        assert [key.ends_visit for key in own] == [False] * (4 * num_micro - 1) + [True]
        assert {key.client for key in own} == {visit.client}


def test_clients_are_sampled_without_replacement_and_evenly() -> None:
    schedule = make_schedule(num_rounds=400, clients_per_round=2)
    rounds = [[v.client for v in schedule.plan(r).visits] for r in range(400)]
    assert all(a < b for a, b in rounds)
    counts = np.bincount([client for pair in rounds for client in pair])
    assert counts.min() > 120  # 160 expected of each, standard deviation below 10
    assert counts.max() < 200


def test_clients_without_samples_are_never_drawn_and_the_others_evenly() -> None:
    partition = partition_of((9, 0, 7, 0, 6))
    schedule = Schedule(partition, num_rounds=400, clients_per_round=2, batch_size=3, local_steps=1)
    drawn = [v.client for r in range(400) for v in schedule.plan(r).visits]
    counts = np.bincount(drawn)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert counts[[0, 2, 4]].min() > 230  # 267 expected of each, standard deviation below 10


def test_an_empty_client_changes_no_other_clients_batches() -> None:
    settings = {"num_rounds": 3, "batch_size": 3, "local_epochs": 2}
    full = Schedule(partition_of((9, 4, 7)), clients_per_round=3, **settings)
    holding = full.partition.order[np.r_[:9, 13:20]]
    fewer = Partition(holding, np.array([0, 9, 9, 16]), full.partition.names)
    lost = Schedule(fewer, clients_per_round=2, **settings)
    for round_ in range(3):
        batches = [k.samples.tolist() for k in full.plan(round_).batches() if k.client != 1]
        assert [key.samples.tolist() for key in lost.plan(round_).batches()] == batches


def test_steps_are_averaged_over_the_clients_that_hold_samples() -> None:
    schedule = Schedule(
        partition_of((9, 0, 4)), num_rounds=1, clients_per_round=2, batch_size=3, local_epochs=2
    )
    assert schedule.mean_steps() == 2 * (3 + 2) / 2
    assert schedule.in_one_place().local_steps == 10


@pytest.mark.parametrize("clients_per_round", [3, 0])
def test_only_clients_with_samples_can_be_sampled(clients_per_round: int) -> None:
    message = "but the safety filter leaves 2 of 3 clients a sample; choose 1 to 2"
    with pytest.raises(ValueError, match=f"clients_per_round is {clients_per_round}, {message}"):
        Schedule(
            partition_of((9, 0, 4)),
            num_rounds=1,
            clients_per_round=clients_per_round,
            batch_size=3,
            local_steps=1,
        )


def test_failures_come_at_the_rate_asked_for_and_cost_no_batches() -> None:
    schedule = make_schedule(failure_probability=0.3)
    visits = [visit for r in range(300) for visit in schedule.plan(r).visits]
    assert 0.25 < np.mean([v.failed for v in visits]) < 0.35
    assert {v.num_steps for v in visits if v.failed} == {0}
    plan = next(
        plan for plan in map(schedule.plan, range(300)) if any(v.failed for v in plan.visits)
    )
    trained = {v.number for v in plan.visits if not v.failed}
    assert {key.visit for key in plan.batches()} == trained
    assert len(plan) == 4 * len(trained)


def test_failures_leave_the_sampled_clients_and_their_batches_as_they_are() -> None:
    certain, failing = make_schedule(), make_schedule(failure_probability=0.5)
    for round_ in range(5):
        plans = certain.plan(round_), failing.plan(round_)
        assert [v.client for v in plans[0].visits] == [v.client for v in plans[1].visits]
        survivors = {v.client for v in plans[1].visits if not v.failed}
        expected = [plain(key) for key in plans[0].batches() if key.client in survivors]
        assert [plain(key) for key in plans[1].batches()] == expected


def test_a_million_clients_are_planned_without_looking_at_all_of_them() -> None:
    num_clients = 1_000_000
    offsets = np.arange(num_clients + 1) * 2
    partition = Partition(np.arange(2 * num_clients), offsets, NumberedNames(num_clients))
    schedule = Schedule(partition, num_rounds=1, clients_per_round=10, batch_size=2, local_epochs=1)
    schedule.plan(0)
    tracemalloc.start()
    keys = list(schedule.plan(1).batches())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(keys) == 10
    assert peak < 100_000, "a byte for each client would already be more"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clients_per_round": 6}, "clients_per_round is 6, but there are 5 clients; choose 1 to"),
        ({"clients_per_round": 0}, "clients_per_round is 0, but there are 5 clients"),
        ({"local_epochs": 1, "local_steps": 1}, "not both or none; got local_steps=1 and local_e"),
        ({"local_steps": None}, "not both or none; got local_steps=None and local_epochs=None"),
        ({"local_steps": 0}, "local_steps is 0; give 1 or more"),
        ({"local_epochs": 0}, "local_epochs is 0; give 1 or more"),
        ({"num_rounds": 0}, "num_rounds is 0; give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
        ({"failure_probability": 1.5}, "failure_probability is 1.5; give 0 to 1"),
    ],
)
def test_a_number_out_of_range_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(**settings)


def shares(num_groups: int, num_ranks: int) -> list[Share]:
    return [Share(g, num_groups, r, num_ranks) for g in range(num_groups) for r in range(num_ranks)]


@pytest.mark.parametrize("num_micro", [1, 2])
def test_the_ranks_of_a_group_share_each_step_without_loss_or_doubles(num_micro: int) -> None:
    whole = make_schedule(local_epochs=2)
    ranks = [
        make_schedule(local_epochs=2, num_micro=num_micro, share=share) for share in shares(1, 3)
    ]
    keys = [list(rank.plan(1).batches()) for rank in ranks]
    assert len({len(each) for each in keys}) == 1
    parts: dict[tuple[int, int], list[BatchKey]] = {}
    for key in (key for each in keys for key in each):
        parts.setdefault((key.client, key.step), []).append(key)
    for step in whole.plan(1).batches():
        own = parts.pop((step.client, step.step))
        assert sorted(key.part for key in own) == list(range(3 * num_micro))
        assert {key.num_parts for key in own} == {3 * num_micro}
        joined = [i for key in own for i in key.samples.tolist()]
        assert sorted(joined) == sorted(step.samples.tolist())
        assert all(np.array_equal(key.step_samples, step.samples) for key in own)
    assert not parts


@pytest.mark.parametrize("clients_per_round", [1, 3, 4, 5])
@pytest.mark.parametrize("num_groups", [2, 3, 4])
def test_groups_share_the_visits_and_have_as_many_batches(
    clients_per_round: int, num_groups: int
) -> None:
    settings = {"clients_per_round": clients_per_round, "local_epochs": 1, "server_visits": "every"}
    whole = make_schedule(**settings).plan(2)
    plans = [make_schedule(**settings, share=share).plan(2) for share in shares(num_groups, 1)]
    assert len({len(plan) for plan in plans}) == 1
    assert all(plan.owners == plans[0].owners for plan in plans)
    found: list[tuple[object, ...]] = []
    for plan in plans:
        batches = list(plan.batches())
        assert len(batches) == len(plan)
        assert batches[-1].is_server_visit
        busy = [key for key in batches[:-1] if not key.is_idle]
        assert batches[: len(busy)] == busy, "a rank idles when its visits are over, not before"
        found += map(plain, busy)
    assert sorted(found, key=repr) == sorted(map(plain, list(whole.batches())[:-1]), key=repr)


def test_a_rank_that_idles_skips_what_is_done() -> None:
    plan = make_schedule(clients_per_round=1, share=Share(1, 2)).plan(0)
    assert [key.is_idle for key in plan.batches()] == [True] * 4
    assert [key.is_idle for key in plan.batches(start=3)] == [True]
    assert list(plan.batches(start=4)) == []


def test_visits_are_spread_by_the_tokens_they_train_on() -> None:
    tokens = np.ones(200, dtype=np.int32)
    first = make_schedule(clients_per_round=5, local_steps=1).partition.samples_of(3)
    tokens[first] = 1000  # client 3 holds one sample, and a long one
    even, by_tokens = (
        make_schedule(clients_per_round=5, sample_tokens=each, share=Share(0, 2)).plan(0).owners
        for each in (None, tokens)
    )
    assert [client for client, group in by_tokens.items() if group == by_tokens[3]] == [3]
    assert [client for client, group in even.items() if group == even[3]] != [3]


def test_a_client_that_fails_is_nobodys() -> None:
    plan = make_schedule(clients_per_round=5, failure_probability=0.5, share=Share(0, 2)).plan(0)
    failed = {visit.client for visit in plan.visits if visit.failed}
    assert failed
    assert plan.owners.keys() == {visit.client for visit in plan.visits} - failed


def test_visits_elsewhere_are_one_batch_here_and_the_clients_are_the_same() -> None:
    for visits in ("none", "every"):
        here = make_schedule(seed=4, server_visits=visits)
        there = make_schedule(seed=4, server_visits=visits, elsewhere=True)
        for round_ in range(3):
            ours, theirs = there.plan(round_), here.plan(round_)
            assert ours.visits == theirs.visits
            keys = list(ours.batches())
            assert [key.is_idle for key in keys] == [True, False][: len(keys)]
            assert [key.is_server_visit for key in keys] == [False, True][: len(keys)]
            assert len(ours) == len(keys) == 1 + (visits == "every")
            assert plain_batches(there, round_, start=1) == [plain(key) for key in keys[1:]]


def test_of_fewer_clients_than_a_round_has_all_are_asked() -> None:
    schedule = make_schedule(clients_per_round=9, elsewhere=True)
    assert [visit.client for visit in schedule.plan(0).visits] == [0, 1, 2, 3, 4]
    nobody = Partition(np.zeros(0, np.int64), np.zeros(1, np.int64), ())
    assert replace(schedule, partition=nobody).plan(0).visits == []
    with pytest.raises(ValueError, match="clients_per_round is 0"):
        make_schedule(clients_per_round=0, elsewhere=True)
