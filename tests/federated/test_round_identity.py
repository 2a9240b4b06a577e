from collections.abc import Callable
from typing import Any

import pytest

from fedsafe.federated.checkpoint import RoundCheckpoint
from fedsafe.federated.client_drift import FedProx
from fedsafe.federated.constitutional_training import ConstitutionalTraining
from fedsafe.federated.round_identity import refuse_unfit, settings_of_rank
from fedsafe.federated.server_optimizer import FedAdam
from fedsafe.peers import Peers
from fedsafe.strategies.layout import ONE_RANK, Layout

FederationMaker = Callable[..., Any]
RULES = {"trainer.accumulate_grad_batches": 2}


def settings(run: Any, layout: Layout = ONE_RANK) -> dict[str, Any]:
    return settings_of_rank(
        vars(run.rounds), trainer=run.trainer, model=run.module.hparams, layout=layout
    )


def differing(one: dict[str, Any], two: dict[str, Any]) -> set[str]:
    return {name for name in {**one, **two} if one.get(name) != two.get(name)}


@pytest.mark.parametrize(
    ("one", "two", "named"),
    [
        (
            {"rounds": {"server_optimizer": FedAdam(0.1)}},
            {"rounds": {"server_optimizer": FedAdam(0.2)}},
            "server_optimizer.learning_rate",
        ),
        (
            {"rounds": {"client_drift": FedProx(0.1)}},
            {"rounds": {"client_drift": FedProx(0.2)}},
            "client_drift.mu",
        ),
        (
            {"rounds": {"cai": ConstitutionalTraining(sft_learning_rate=1e-4)}},
            {"rounds": {"cai": ConstitutionalTraining(sft_learning_rate=2e-4)}},
            "cai.sft_learning_rate",
        ),
        ({"rounds": {"failure_probability": 0.1}}, {}, "federated.failure_probability"),
        ({"model": {"learning_rate": 0.1}}, {"model": {"learning_rate": 0.2}}, "model.learning_r"),
        ({"trainer": {"gradient_clip_val": 1.0}}, {}, "trainer.gradient_clip_val"),
        ({"trainer": {"limit_val_batches": 0.5}}, {}, "trainer.limit_val_batches"),
        (
            {"callbacks": (RoundCheckpoint(every_n_steps=3),)},
            {"callbacks": (RoundCheckpoint(),)},
            "checkpoint.every_n_steps",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_ranks_compare_rates_limits_and_rules_too(
    federation: FederationMaker, one: dict[str, Any], two: dict[str, Any], named: str
) -> None:
    same, other = (federation(name, **given) for name, given in (("a", one), ("b", two)))
    found = differing(settings(same), settings(other))
    assert [name for name in found if name.startswith(named)]
    again = federation("c", **one)
    assert not differing(settings(same), settings(again))


def test_ranks_compare_who_does_what(federation: FederationMaker) -> None:
    run = federation()
    groups = Layout(clients=Peers(0, 2), world=Peers(0, 2))
    found = differing(settings(run), settings(run, groups))
    assert found == {"strategy.clients", "ranks"}


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"identity": {"a": 2}}, "a was 2 and is 1"),
        ({"batches_done": 4, "rules_of_round": {}}, "accumulate_grad_batches was None and is 2"),
        ({"batches_done": 3}, "between accumulated parts of a step and lacks their gradients"),
        ({"batches_done": 4}, "inside round 3, by ranks that trained one client at a time"),
    ],
    ids=["identity", "rules", "part", "ranks apart"],
)
def test_a_checkpoint_that_cannot_be_gone_on_from_is_refused(
    saved: dict[str, Any], message: str
) -> None:
    state = {"identity": {"a": 1}, "rules_of_round": RULES, "batches_done": 0, "round": 2} | saved
    current = {"identity": {"a": 1}, "rules_of_round": RULES}
    with pytest.raises(ValueError, match=message):
        refuse_unfit(state, current, layout=Layout(clients=Peers(0, 2)))


@pytest.mark.parametrize(
    ("batches_done", "layout"),
    [(0, Layout(clients=Peers(0, 2))), (4, ONE_RANK), (4, Layout(data=Peers(0, 2)))],
    ids=["a round's end, ranks apart", "inside, one rank", "inside, ranks that share steps"],
)
def test_others_are_taken(batches_done: int, layout: Layout) -> None:
    state = {"identity": {}, "rules_of_round": RULES, "batches_done": batches_done, "round": 2}
    refuse_unfit(state, {"identity": {}, "rules_of_round": RULES}, layout=layout)
