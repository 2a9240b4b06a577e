from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import Callback

from fedsafe.data.packing import pack
from fedsafe.federated.aggregation import RefusedUpdateError
from fedsafe.federated.client_drift import FedProx, Scaffold
from fedsafe.federated.local_training import LocalTraining, train_client

FederationMaker = Callable[..., Any]


@pytest.fixture
def run(federation: FederationMaker) -> Any:
    """A finished run, for its model, its data and its schedule."""
    return federation(model={"optimizer": "sgd", "learning_rate": 0.5}).fit()


def batches_of(run: Any, client: int = 2) -> Any:
    visit = next(v for v in run.rounds._schedule.plan(0).visits if v.client == client)
    return run.data.client_dataloader(visit)


def test_a_client_trains_as_plain_sgd_does(run: Any) -> None:
    start = run.start
    update = train_client(run.module, batches_of(run), start=start)
    run.module.flat_adapter().write(start)
    parameters, nats = run.module.flat_adapter().parameters, []
    for batch in batches_of(run):
        nll = run.module(pack([run.data.store[i] for i in batch.key.samples]))
        nats += nll.tolist()
        gradients = torch.autograd.grad(nll.mean(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.5 * gradient
    torch.testing.assert_close(update.adapter, run.module.flat_adapter().read())
    assert (update.num_steps, update.num_tokens) == (3, len(nats))
    assert update.loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_a_client_knows_nothing_of_the_one_before(federation: FederationMaker) -> None:
    run = federation(model={"lora_dropout": 0.2}).fit()  # AdamW, whose moments could stay
    start = run.start
    kept = start.clone()
    first = train_client(run.module, batches_of(run, client=1), start=start)
    other = train_client(run.module, batches_of(run, client=2), start=start)
    again = train_client(run.module, batches_of(run, client=1), start=start)
    assert torch.equal(first.adapter, again.adapter)
    assert first.loss == again.loss
    assert not torch.equal(first.adapter, other.adapter)
    assert torch.equal(start, kept)


def test_the_base_stays_loaded_from_client_to_client(run: Any) -> None:
    base = run.module.peft_model
    train_client(run.module, batches_of(run), start=run.start)
    assert run.module.peft_model is base


def test_drift_keeps_what_the_client_learnt(run: Any) -> None:
    drift, start = Scaffold(), run.start
    update = train_client(run.module, batches_of(run), start=start, client=2, drift=drift)
    # option II of the paper, c and c_i being zero: (x - y) / (K * lr)
    expected = (start - update.adapter) / (3 * 0.5)
    torch.testing.assert_close(drift.client_controls[2], expected, atol=1e-6, rtol=1e-4)


def test_drift_corrects_the_steps(run: Any) -> None:
    free = train_client(run.module, batches_of(run), start=run.start)
    held = train_client(run.module, batches_of(run), start=run.start, drift=FedProx(mu=1.0))
    distances = [(u.adapter - run.start).norm() for u in (free, held)]
    assert distances[1] < 0.9 * distances[0]


def test_settings_of_the_trainer_reach_it(run: Any) -> None:
    settings = {"gradient_clip_val": 1e-9}
    update = train_client(run.module, batches_of(run), start=run.start, trainer_settings=settings)
    torch.testing.assert_close(update.adapter, run.start, atol=1e-6, rtol=0)


class _Counts(Callback):
    num_batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.num_batches += 1


@pytest.mark.parametrize("as_list", [False, True])
def test_callbacks_of_the_caller_are_called_too(run: Any, as_list: bool) -> None:
    counts = _Counts()
    settings = {"callbacks": [counts] if as_list else counts}
    train_client(run.module, batches_of(run), start=run.start, trainer_settings=settings)
    assert counts.num_batches == 3


def test_batches_that_the_trainer_would_accumulate_otherwise_are_refused(run: Any) -> None:
    settings = {"accumulate_grad_batches": 2}
    with pytest.raises(ValueError, match=r"steps of 1, but accumulate_grad_batches is 2; give the"):
        train_client(run.module, batches_of(run), start=run.start, trainer_settings=settings)


def _overflowing(local: LocalTraining) -> None:
    """One gradient is infinite when it is averaged and zero when the optimizer steps."""
    gradient = local._adapter.gradients()[0]
    gradient.fill_(float("inf"))
    assert local.correction is not None
    local.correction.apply(local._adapter)
    gradient.zero_()


def test_what_drift_would_remember_for_ever_must_be_finite(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drift = Scaffold()
    train_client(run.module, batches_of(run), start=run.start, drift=drift)
    kept = drift.client_controls[0].clone()
    monkeypatch.setattr(LocalTraining, "correct_gradients", _overflowing)
    with pytest.raises(RefusedUpdateError, match="control variate are not finite"):
        train_client(run.module, batches_of(run), start=run.start, drift=drift)
    assert torch.equal(drift.client_controls[0], kept)
