"""Our server against Flower's strategies, on the same clients' updates over several rounds.

FedAvg and FedAvgM agree as they are. Flower's adaptive strategies (flwr 1.41) depart from Algorithm
2 of Reddi et al. (2021), which ours follow:

- FedAdam, FedYogi and FedAdagrad start from second moments ``v = 0``; the paper's, and ours, start
  from ``tau^2``.
- FedAdam scales its step in round t = 1, 2, … by ``sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1))``. The
  paper's Algorithm 2 corrects nothing, and Adam's own correction has t in place of t + 1. It also
  answers in float64, whatever it is given.
- FedAdagrad has no ``beta1``: it is 0.
- FedAvgM measures the clients' mean from its own last answer and not from what the clients were
  sent: what the server trains between two rounds goes into the step and the momentum, as if the
  clients had done it.

So Flower's second moments are set to ``tau^2`` here and FedAdam's scale is taken out; what is left
must be the same. A strategy is given float64, so that what differs is our float32 alone.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsafe.federated import server_optimizer as ours
from fedsafe.federated.aggregation import RefusedUpdateError, WeightedMean

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, strategy
from flwr.supercore.task_identity import TaskIdentity

pytestmark = [pytest.mark.oracle, pytest.mark.flower]

NUM_ROUNDS = 6
SIZE = 200
SAMPLES = {11: 30, 12: 1, 13: 169}
"""Samples of each client, by the node that it is on."""
STEP, BETA1, BETA2, TAU = 0.05, 0.8, 0.95, 0.01
MOMENTUM = 0.7


class Scene(NamedTuple):
    """A global adapter, and by how much each client moves what it is sent, round by round."""

    start: Tensor
    moves: list[dict[int, Tensor]]


@pytest.fixture
def scene() -> Scene:
    """Updates from a thousandth to a hundred times the adapter: both sides of Yogi's sign."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(SIZE, generator=generator)

    moves = [{node: normal() * 10.0 ** (t - 3) for node in SAMPLES} for t in range(NUM_ROUNDS)]
    return Scene(normal(), moves)


class PlayedClients(Grid):
    """Stands where Flower's network is: each client adds the move of its round."""

    run = None

    def __init__(self, moves: list[dict[int, Tensor]]) -> None:
        self.moves = moves

    def get_node_ids(self) -> Iterable[int]:
        return list(SAMPLES)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return [self.answer(message) for message in messages]

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        move = self.moves[message.content["config"]["server-round"] - 1][node]
        sent = message.content["arrays"]["adapter"].numpy()
        metrics = MetricRecord({"num-examples": SAMPLES[node], "loss": 0.0})
        trained = ArrayRecord({"adapter": Array(sent + move.numpy().astype(sent.dtype))})
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    def set_run(self, *_: Any) -> None:
        raise NotImplementedError

    create_message = push_messages = pull_messages = set_run


class UnscaledFedAdam(strategy.FedAdam):
    """Flower's FedAdam without the scale of its steps, as in the paper's Algorithm 2."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.eta = STEP / scale(server_round)
        return super().aggregate_train(server_round, replies)


def scale(server_round: int) -> float:
    """What Flower multiplies FedAdam's step size with; rounds count from 1."""
    exponent = server_round + 1
    return float(np.sqrt(1 - BETA2**exponent) / (1 - BETA1**exponent))


def adaptive(
    kind: type[strategy.FedAvg], *, second: float = TAU**2, **settings: float
) -> strategy.FedAvg:
    """One of Flower's adaptive strategies, its second moments set as the paper sets them."""
    made = kind(fraction_evaluate=0.0, eta=STEP, tau=TAU, **settings)
    made.v_t = {"adapter": np.full(SIZE, second)}
    return made


def flowers(
    made: strategy.FedAvg, scene: Scene, monkeypatch: pytest.MonkeyPatch, *, dtype: Any = np.float64
) -> np.ndarray:
    """The adapter at the end of Flower's own loop of rounds."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    start = ArrayRecord({"adapter": Array(scene.start.numpy().astype(dtype))})
    result = made.start(PlayedClients(scene.moves), start, num_rounds=len(scene.moves))
    return result.arrays["adapter"].numpy()


def mean_of(adapter: Tensor, moves: dict[int, Tensor]) -> Tensor:
    """The clients' mean as our server forms it."""
    mean = WeightedMean(adapter)
    for node, move in moves.items():
        mean.add(adapter + move, weight=SAMPLES[node])
    return mean.mean()


def our_rounds(optimizer: ours.ServerOptimizer, scene: Scene) -> Tensor:
    """The adapter at the end of our server's rounds: float32, as in a run."""
    adapter = scene.start
    for moves in scene.moves:
        adapter = optimizer.step(adapter, mean_of(adapter, moves))
    return adapter


BETAS = {"beta_1": BETA1, "beta_2": BETA2}
PAIRS = {
    "fedavg": (ours.FedAvg, lambda: strategy.FedAvg(fraction_evaluate=0.0)),
    "fedavgm": (
        lambda: ours.FedAvgM(momentum=MOMENTUM, learning_rate=STEP),
        lambda: strategy.FedAvgM(
            fraction_evaluate=0.0, server_momentum=MOMENTUM, server_learning_rate=STEP
        ),
    ),
    "fedadagrad": (
        lambda: ours.FedAdagrad(learning_rate=STEP, beta1=0.0, tau=TAU),
        lambda: adaptive(strategy.FedAdagrad),
    ),
    "fedadam": (
        lambda: ours.FedAdam(learning_rate=STEP, beta1=BETA1, beta2=BETA2, tau=TAU),
        lambda: adaptive(UnscaledFedAdam, **BETAS),
    ),
    "fedyogi": (
        lambda: ours.FedYogi(learning_rate=STEP, beta1=BETA1, beta2=BETA2, tau=TAU),
        lambda: adaptive(strategy.FedYogi, **BETAS),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_rounds_end_with_the_adapter_of_flowers_strategy(
    scene: Scene, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_ours, make_flowers = PAIRS[name]
    expected = flowers(make_flowers(), scene, monkeypatch)
    np.testing.assert_allclose(our_rounds(make_ours(), scene), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_the_rules_are_the_same_beyond_float32(
    scene: Scene, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_ours, make_flowers = PAIRS[name]
    optimizer, adapter = make_ours(), scene.start.double()
    total = sum(SAMPLES.values())
    for moves in scene.moves:
        mean = sum((adapter + moves[k].double()) * (n / total) for k, n in SAMPLES.items())
        adapter = optimizer.step(adapter, mean)
    expected = flowers(make_flowers(), scene, monkeypatch)
    np.testing.assert_allclose(adapter, expected, rtol=1e-11, atol=1e-13)


def test_the_mean_of_a_round_is_flowers_to_the_bit(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours adds up in float64 and rounds once; Flower's mean of the same float32 in float64."""
    moves = scene.moves[2]
    trained = {k: (scene.start + move).double() - scene.start.double() for k, move in moves.items()}
    one_round = Scene(scene.start, [trained])
    expected = flowers(strategy.FedAvg(fraction_evaluate=0.0), one_round, monkeypatch)
    assert np.array_equal(mean_of(scene.start, moves).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        pytest.param(strategy.FedYogi, 1.0, id="FedYogi"),
        pytest.param(strategy.FedAdam, scale(1), id="FedAdam"),
    ],
)
def test_flower_by_itself_starts_from_no_second_moment_and_scales_fedadam(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: type[strategy.FedAvg], factor: float
) -> None:
    """What the tests above set alike, so that it is not left unsaid."""
    made = kind(fraction_evaluate=0.0, eta=STEP, tau=TAU, **BETAS)
    answer = flowers(made, Scene(scene.start, scene.moves[:1]), monkeypatch)
    start = scene.start.double().numpy()
    delta = sum(scene.moves[0][k].double().numpy() * n / 200 for k, n in SAMPLES.items())
    second = (1 - BETA2) * delta**2
    step = STEP * factor * (1 - BETA1) * delta / (np.sqrt(second) + TAU)
    np.testing.assert_allclose(answer, start + step, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "answer"),
    [("fedavg", np.float32), ("fedavgm", np.float32), ("fedadam", np.float64)],
)
def test_flowers_fedadam_answers_float32_in_float64(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, name: str, answer: type
) -> None:
    made = PAIRS[name][1]()
    made.v_t = None  # as Flower makes it: of the adapter's type
    assert flowers(made, scene, monkeypatch, dtype=np.float32).dtype == answer
    assert our_rounds(PAIRS[name][0](), scene).dtype == torch.float32


def test_what_the_server_trains_between_rounds_stays_with_ours_and_not_with_flowers_fedavgm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clients give back what they were sent: nothing may change but by the server's training.

    Without momentum, with half a step, and 3 added by the server after the first round.
    """
    still = dict.fromkeys(SAMPLES, torch.zeros(SIZE))
    sent = torch.ones(SIZE) + 3
    half = ours.FedAvgM(momentum=0.0, learning_rate=0.5)
    half.step(torch.ones(SIZE), mean_of(torch.ones(SIZE), still))
    assert torch.equal(half.step(sent, mean_of(sent, still)), sent)

    made = strategy.FedAvgM(fraction_evaluate=0.0, server_learning_rate=0.5)
    flowers(made, Scene(torch.ones(SIZE), [still]), monkeypatch)
    answer = flowers(made, Scene(sent, [still]), monkeypatch)
    assert np.array_equal(answer, np.full(SIZE, 1 + 3 / 2))


def test_a_client_that_is_not_finite_poisons_flowers_mean_and_is_refused_by_ours(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {**scene.moves[0], 12: torch.full((SIZE,), torch.nan)}
    answer = flowers(strategy.FedAvg(fraction_evaluate=0.0), Scene(scene.start, [bad]), monkeypatch)
    assert np.isnan(answer).all()
    with pytest.raises(RefusedUpdateError, match=f"{SIZE} of {SIZE} values are not finite"):
        mean_of(scene.start, bad)
