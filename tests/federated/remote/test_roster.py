"""Numbers of clients, and what they hold."""

import tracemalloc
from pathlib import Path

import numpy as np

from fedsafe.federated.remote.roster import Member, Roster


def test_a_roster_comes_back_as_it_was_written(tmp_path: Path) -> None:
    members = [Member("ada", 2**63, 5, 50, {"judged": 6}), Member("bob")]
    roster = Roster(tmp_path / "new" / "roster.json", members=members)
    roster.write()
    again = Roster.read(roster.file)
    assert again.members == members
    assert again.run == roster.run


def test_each_run_has_a_name_of_its_own(tmp_path: Path) -> None:
    assert Roster(tmp_path).run != Roster(tmp_path).run


def test_a_client_keeps_its_number(tmp_path: Path) -> None:
    roster = Roster(tmp_path)
    assert [roster.add(name) for name in ("bob", "ada", "bob", "cyd")] == [0, 1, 0, 2]
    assert roster.number_of("ada") == 1
    assert roster.number_of("eve") is None


def test_who_is_not_there_holds_nothing_and_keeps_its_place(tmp_path: Path) -> None:
    members = [Member(name, 1, size) for name, size in (("a", 4), ("b", 7), ("c", 0))]
    roster = Roster(tmp_path, members=members)
    everyone, some = roster.partition(), roster.partition({1, 2})
    assert everyone.sizes.tolist() == [4, 7, 0]
    assert everyone.num_holding == 2
    assert some.sizes.tolist() == [0, 7, 0]
    assert list(some.names) == ["a", "b", "c"]
    assert len(everyone.samples_of(1)) == 7


def test_a_number_that_a_node_sends_takes_no_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    partition = Roster(tmp_path, members=[Member("a", 1, 2**39), Member("b", 1, 2**39)]).partition()
    assert partition.sizes.tolist() == [2**39, 2**39]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert np.array_equal(partition.samples_of(1)[:3], [0, 0, 0])
