"""Settings of constitutional training, and the samples of its steps."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from fedsafe.federated.constitutional_training import ConstitutionalTraining, Mixture


def mixture(
    objective: Any = "sft", *, revised: int = 10, helpful: int = 4, share: int = 1
) -> Mixture:
    return Mixture(objective, np.arange(revised), np.arange(100, 100 + helpful), 4 - share, share)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"regime": "full", "iterations": 5}, "full trains on all pairs", id="full"),
        pytest.param({"iterations": -1}, "iterations is -1; give 0 or more", id="iterations"),
        pytest.param({"dpo_share": 1.5}, "dpo_share is 1.5; give 0 to 1", id="dpo share"),
        pytest.param({"beta": 0.0}, "beta is 0.0; give a number above 0", id="beta"),
        pytest.param({"beta": float("nan")}, "beta is nan; give a number above 0", id="nan beta"),
        pytest.param({"sft_learning_rate": -1.0}, "sft_learning_rate is -1.0; give", id="sft rate"),
        pytest.param({"dpo_learning_rate": 0.0}, "dpo_learning_rate is 0.0; give", id="dpo rate"),
        pytest.param({"nll_weight": -0.1}, "nll_weight is -0.1; give 0 or more", id="nll weight"),
        pytest.param({"nll_weight": float("nan")}, "nll_weight is nan; give", id="nan nll weight"),
        pytest.param({"warmup_steps": -1}, "warmup_steps is -1; give 0 or more", id="warm-up"),
        pytest.param({"max_passes": 0}, "max_passes is 0; give 1 or more", id="passes"),
        pytest.param({"num_probe": 0}, "num_probe is 0; give 1 or more", id="probe"),
        pytest.param({"probe_every": 0}, "probe_every is 0; give 1 or more", id="probe every"),
        pytest.param({"refusal_floor": 101.0}, "refusal_floor is 101.0; give percent", id="floor"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConstitutionalTraining(**settings)


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({"regime": "cheap"}, "every"),
        ({"regime": "full"}, "every"),
        ({"regime": "adaptive"}, "every"),
        ({"regime": "final"}, "last"),
        ({"regime": "cheap", "iterations": 0}, "none"),
        ({"regime": "final", "iterations": 0}, "none"),
    ],
)
def test_the_regime_says_in_which_rounds_the_server_trains(
    settings: dict[str, Any], rounds: str
) -> None:
    assert ConstitutionalTraining(**settings).server_visits == rounds


@pytest.mark.parametrize(
    ("settings", "sft", "dpo"),
    [
        pytest.param({}, 25, 25, id="the paper's 50"),
        pytest.param({"iterations": 10, "dpo_share": 0.3}, 7, 3, id="a share of preferences"),
        pytest.param({"iterations": 10, "dpo_share": 0.0}, 10, 0, id="no preferences"),
        pytest.param({"regime": "full"}, 34, 34, id="a pass over everything"),
        pytest.param({"regime": "final"}, 34, 34, id="a pass at the end"),
        pytest.param({"regime": "final", "iterations": 8}, 4, 4, id="a few steps at the end"),
        pytest.param({"regime": "full", "dpo_share": 0.0}, 34, 0, id="a pass without preferences"),
        pytest.param({"regime": "full", "dpo_share": 1.0}, 0, 34, id="preferences alone"),
    ],
)
def test_steps_of_each_objective(settings: dict[str, Any], sft: int, dpo: int) -> None:
    training = ConstitutionalTraining(**settings)
    steps = [training.num_steps(mixture(name, revised=100)) for name in ("sft", "dpo")]
    assert steps == [sft, dpo]


def test_few_pairs_are_not_seen_more_often_than_max_passes() -> None:
    training = ConstitutionalTraining(iterations=50, max_passes=2)
    assert training.num_steps(mixture(revised=7)) == 6  # 3 steps a pass of 3, 3 and 1
    assert training.num_steps(mixture(revised=0)) == 0


@pytest.mark.parametrize(
    ("settings", "prompts"),
    [
        ({"iterations": 10, "dpo_share": 0.3}, 28),
        ({"regime": "full"}, None),
        ({"regime": "final"}, None),
        ({"regime": "adaptive", "iterations": 6}, 12),
    ],
)
def test_no_more_prompts_are_asked_than_steps_have_a_use_for(
    settings: dict[str, Any], prompts: int | None
) -> None:
    assert ConstitutionalTraining(**settings).num_prompts(4) == prompts


def test_a_pass_sees_every_revised_answer_once_and_helpful_ones_go_round() -> None:
    mixed = mixture(revised=9, helpful=2)
    steps = [mixed.samples_of(step, seed=0, round_=0) for step in range(mixed.steps_per_pass)]
    seen = Counter(int(sample) for step in steps for sample in step)
    assert [seen[sample] for sample in range(9)] == [1] * 9
    assert sum(seen[sample] for sample in (100, 101)) == 3
    assert all(len(step) == 4 for step in steps)


def test_a_step_draws_the_same_whenever_it_is_asked_for() -> None:
    mixed = mixture()
    late = mixed.samples_of(7, seed=3, round_=2)
    assert late.tolist() == mixed.samples_of(7, seed=3, round_=2).tolist()
    others = [
        mixed.samples_of(7, seed=4, round_=2),
        mixed.samples_of(7, seed=3, round_=1),
        mixture("dpo").samples_of(7, seed=3, round_=2),
    ]
    assert all(late.tolist() != other.tolist() for other in others)


def test_the_rate_of_an_objective_rises_over_its_warm_up_and_falls_to_nothing() -> None:
    training = ConstitutionalTraining(sft_learning_rate=1.0, dpo_learning_rate=0.5, warmup_steps=2)
    rates = [training.learning_rate("sft", step, 4) for step in range(4)]
    assert rates == [0.5, 0.75, 0.5, 0.25]
    assert training.learning_rate("dpo", 0, 4) == 0.25
    plain = ConstitutionalTraining(dpo_learning_rate=0.5)
    assert [plain.learning_rate("dpo", step, 2) for step in range(2)] == [0.5, 0.25]
