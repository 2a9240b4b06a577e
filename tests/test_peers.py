"""Work that several ranks share; the ranks are threads here."""

import pytest
from thread_peers import together

from fedsafe.peers import ALONE, Peers
from fedsafe.safety.guard import UnjudgeableError


def doubled(number: int) -> int:
    if number == 99:
        raise UnjudgeableError({3: "too long"})
    return 2 * number


@pytest.mark.parametrize("num_units", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("size", [2, 3])
def test_all_get_all_results_in_the_order_of_the_units(size: int, num_units: int) -> None:
    found = together(size, lambda peers: list(peers.in_turns(range(num_units), doubled)))
    assert found == [list(ALONE.in_turns(range(num_units), doubled))] * size
    assert found[0] == [2 * number for number in range(num_units)]


def test_each_unit_is_done_by_one_rank_which_is_told_by_its_number() -> None:
    def units(peers: Peers) -> list[int]:
        done: list[int] = []
        list(peers.in_turns(range(5), done.append))
        return done

    assert together(2, units) == [[0, 2, 4], [1, 3]]


def test_what_goes_wrong_on_one_rank_is_raised_on_all_behind_the_results_before_it() -> None:
    def until_it_fails(peers: Peers) -> tuple[list[int], dict[int, str]]:
        results = peers.in_turns([1, 2, 99, 4], doubled)
        found = [next(results), next(results)]
        with pytest.raises(UnjudgeableError, match="conversation 3: too long") as caught:
            next(results)
        return found, dict(caught.value.reasons)

    assert together(2, until_it_fails) == [([2, 4], {3: "too long"})] * 2
    assert until_it_fails(ALONE) == ([2, 4], {3: "too long"})


def test_only_the_first_rank_does_what_one_does_for_all() -> None:
    asked: list[int] = []

    def work(peers: Peers) -> str:
        def look() -> str:
            asked.append(peers.index)
            return "found"

        return peers.from_first(look)

    assert together(3, work) == ["found"] * 3
    assert asked == [0]
    assert work(ALONE) == "found"


def test_what_goes_wrong_on_the_first_rank_is_raised_on_all() -> None:
    def missing() -> None:
        raise FileNotFoundError("there is no such file")

    def work(peers: Peers) -> bool:
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            peers.from_first(missing)
        return True

    assert together(2, work) == [True, True]


def test_lists_of_all_ranks_become_one_in_their_order() -> None:
    found = together(3, lambda peers: peers.gather_lists(["abc"[peers.index]] * peers.index))
    assert found == [["b", "c", "c"]] * 3
