"""Rounds on a GPU: what a checkpoint restores lands where the model is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fedsafe.federated.client_drift import ClientDrift, FedProx, Scaffold
from fedsafe.federated.server_optimizer import FedAdam, FedAvg, ServerOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FederationMaker = Callable[..., Any]
ON_GPU = {"accelerator": "gpu", "devices": 1}
NUM_STEPS = 2 * 2 * 3  # rounds, clients, steps


class _EveryStep(Checkpoint):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        folder = Path(trainer.default_root_dir) / "steps"
        trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize(
    ("drift", "optimizer"),
    [(Scaffold(), FedAdam(0.1)), (FedProx(), FedAvg())],
    ids=lambda rule: type(rule).__name__,
)
def test_resuming_from_any_step_gives_the_same_run(
    federation: FederationMaker, tmp_path: Path, drift: ClientDrift, optimizer: ServerOptimizer
) -> None:
    rounds = {"client_drift": drift, "server_optimizer": optimizer}
    callbacks: tuple[Callback, ...] = (_EveryStep(),)
    whole = federation("whole", rounds=rounds, trainer=ON_GPU, callbacks=callbacks).fit()
    expected = whole.adapter.clone()
    assert expected.device.type == "cuda"
    for step in range(1, NUM_STEPS + 1):
        shutil.copytree(whole.folder, tmp_path / f"from {step}")
        resumed = federation(f"from {step}", rounds=rounds, trainer=ON_GPU)
        resumed.fit(ckpt_path=whole.folder / "steps" / f"{step}.ckpt")
        torch.testing.assert_close(resumed.adapter, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mode", ["federated", "local", "central"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_rounds_stay_finite(federation: FederationMaker, mode: str, precision: str) -> None:
    trainer = ON_GPU | {"precision": precision}
    run = federation(rounds={"mode": mode}, trainer=trainer).fit()
    assert bool(torch.isfinite(run.adapter).all())
    assert all(client["status"] == "ok" for row in run.rows for client in row["clients"])


def test_corrected_gradients_may_not_be_scaled(federation: FederationMaker) -> None:
    run = federation(
        rounds={"client_drift": Scaffold()}, trainer=ON_GPU | {"precision": "16-mixed"}
    )
    with pytest.raises(ValueError, match="scales the gradients that client_drift corrects; give"):
        run.fit()
