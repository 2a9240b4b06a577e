import pytest
import torch
from thread_peers import together

from fedsafe.federated.agreement import agreed_adapter, check_agreement, check_same_adapter
from fedsafe.peers import ALONE, Peers


def test_ranks_with_the_same_settings_agree() -> None:
    settings = {"data.samples": "abc", "model.learning_rate": 1e-3}
    together(3, lambda world: check_agreement(world, dict(settings)))


def test_ranks_that_disagree_are_all_told_who_has_what() -> None:
    def start(world: Peers) -> str:
        rate = 0.2 if world.index == 1 else 0.1
        with pytest.raises(ValueError, match="the ranks disagree") as caught:
            check_agreement(world, {"data.seed": 0, "model.learning_rate": rate})
        return str(caught.value)

    messages = together(3, start)
    assert len(set(messages)) == 1
    assert "model.learning_rate is 0.1 on rank 0 and 0.2 on rank 1" in messages[0]
    assert "rank 2" not in messages[0]
    assert "data.seed" not in messages[0]


def test_a_setting_that_one_rank_lacks_is_a_disagreement() -> None:
    def start(world: Peers) -> None:
        check_agreement(world, {"cai.beta": 0.1} if world.index else {})

    with pytest.raises(ValueError, match=r"cai.beta is missing on rank 0 and 0.1 on rank 1"):
        together(2, start)


def test_of_many_differences_some_are_named_and_the_rest_counted() -> None:
    def start(world: Peers) -> None:
        check_agreement(world, {f"setting{n}": world.index for n in range(9)})

    with pytest.raises(ValueError, match=r"setting4 .*; and 4 more; start all of them"):
        together(2, start)


@pytest.mark.parametrize("change", [1e-7, float("nan")], ids=["last bit", "not a number"])
def test_ranks_with_different_adapters_are_named(change: float) -> None:
    def end(world: Peers) -> None:
        adapter = torch.ones(5)
        if world.index == 1:
            adapter[3] += change
        check_same_adapter(world, adapter, round_=4)

    with pytest.raises(ValueError, match="after round 5 rank 1 holds another global adapter"):
        together(2, end)


def test_swapped_values_do_not_pass_for_the_same_adapter() -> None:
    def end(world: Peers) -> None:
        values = [1.0, 2.0, 3.0] if world.index else [2.0, 1.0, 3.0]
        check_same_adapter(world, torch.tensor(values), round_=0)

    with pytest.raises(ValueError, match="rank 1 holds another"):
        together(2, end)


def test_what_is_trained_together_is_the_first_ranks_and_may_differ_by_rounding_alone() -> None:
    def end(world: Peers, change: float) -> torch.Tensor:
        return agreed_adapter(world, torch.ones(5) + world.index * change, round_=1)

    for adapter in together(2, lambda world: end(world, 1e-6)):
        assert torch.equal(adapter, torch.ones(5))
    with pytest.raises(ValueError, match="after round 2 rank 1 holds another global adapter"):
        together(2, lambda world: end(world, 0.01))
    assert torch.equal(agreed_adapter(ALONE, torch.ones(2), round_=0), torch.ones(2))


def test_equal_adapters_pass_and_a_single_rank_has_nobody_to_differ_from() -> None:
    together(2, lambda world: check_same_adapter(world, torch.ones(5), round_=0))
    check_same_adapter(ALONE, torch.ones(5), round_=0)
