"""ZeRO's settings and refusals, in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cpu_zero import CPUZeroStrategy
from jsonargparse import ArgumentParser
from lightning import Trainer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision

from fedsafe.model.module import LoraLM
from fedsafe.strategies import zero
from fedsafe.strategies.layout import layout_of
from fedsafe.strategies.zero import ZeroPrecision, ZeroStrategy

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "strategy"


def trainer_of(**settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    return Trainer(**{**quiet, "strategy": CPUZeroStrategy(stage=3), **settings})


def test_without_a_gpu_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer = trainer_of(strategy=ZeroStrategy(stage=2))
    with pytest.raises(ValueError, match=r"needs a CUDA device and none is visible; take .*ddp"):
        trainer.strategy.setup_environment()


def test_a_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs DeepSpeed; pip install deepspeed"):
        CPUZeroStrategy()


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_keep_the_base_whole_offload_no_parameters(stage: Any) -> None:
    with pytest.raises(ValueError, match=f"ZeRO-{stage} keeps the parameters whole .* stage: 3"):
        CPUZeroStrategy(stage=stage, offload="parameters")


def test_a_trainer_of_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trainer = trainer_of(strategy=ZeroStrategy(stage=1))
    with pytest.raises(ValueError, match=r"the Trainer has a CPUAccelerator; give --trainer.acc"):
        trainer.strategy.setup_environment()


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true"])
def test_precisions_that_would_round_or_scale_are_refused(precision: Any) -> None:
    with pytest.raises(ValueError, match=f"precision='{precision}'.* give 'bf16-mixed'"):
        trainer_of(precision=precision)


def test_clipping_by_value_is_refused() -> None:
    trainer = trainer_of(gradient_clip_val=0.1, gradient_clip_algorithm="value")
    module = LoraLM("gpt2")
    module.trainer = trainer
    with pytest.raises(ValueError, match="clips gradients by their norm alone"):
        trainer.strategy.connect(module)


def test_a_base_in_4_bits_is_not_split() -> None:
    trainer = trainer_of()
    module = LoraLM("gpt2", quantize_4bit=True)
    module.trainer = trainer
    with pytest.raises(ValueError, match=r"ZeRO-3 cannot split a base in 4 bits; take .*ddp"):
        trainer.strategy.connect(module)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_split_base_is_one_replica(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = CPUZeroStrategy(stage=stage)
    monkeypatch.setattr(CPUZeroStrategy, "global_rank", 1)
    monkeypatch.setattr(CPUZeroStrategy, "world_size", 4)
    layout = layout_of(strategy)
    assert (layout.data.index, layout.data.size, layout.clients.size) == (1, 4, 1)
    assert layout.replicas.size == (1 if stage == 3 else 4)
    assert layout.replica.size == (4 if stage == 3 else 1)


def test_batches_are_not_rounded() -> None:
    """A reference's log-probabilities have hundreds of nats; bfloat16 would lose their units."""
    reference = torch.tensor([-301.25, -299.5])
    batch = ZeroPrecision("bf16-mixed").convert_input({"reference": reference})
    assert torch.equal(batch["reference"], reference)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_bfloat16_base_stays_as_narrow(precision: Any) -> None:
    base = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    assert ZeroPrecision(precision).convert_module(base).weight.dtype == torch.bfloat16


def test_lightnings_precision_is_replaced() -> None:
    strategy = CPUZeroStrategy()
    strategy.precision_plugin = DeepSpeedPrecision("bf16-mixed")
    assert isinstance(strategy.precision_plugin, ZeroPrecision)
    assert strategy.precision_plugin.precision == "bf16-mixed"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3-offload"])
def test_configurations_make_the_strategy(name: str) -> None:
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["trainer"]["strategy"]
    parser = ArgumentParser()
    parser.add_subclass_arguments(ZeroStrategy, "strategy")
    parsed = parser.parse_object({"strategy": settings})
    strategy = parser.instantiate(parsed).strategy
    assert strategy.stage == int(name[4])
    assert ("offload_param" in strategy.config["zero_optimization"]) == name.endswith("offload")
