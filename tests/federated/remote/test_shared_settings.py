import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedsafe.data.chat import ensure_chat_template
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.federated.client_drift import FedProx, Scaffold
from fedsafe.federated.remote.shared_settings import (
    base_digest,
    differences,
    library_versions,
    shared_settings,
    tokenizer_digest,
)
from fedsafe.model.module import LoraLM
from fedsafe.safety.verdict_targets import VerdictTargets

Settings = dict[str, Any]


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(folder))
    ensure_chat_template(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def module(tiny_gpt2: Path) -> LoraLM:
    made = LoraLM(base=str(tiny_gpt2))
    made.configure_model()
    return made


@pytest.fixture
def settings(module: LoraLM, tiny_gpt2: Path) -> Callable[..., Settings]:
    """The shared settings of one end; parts of them replaced."""

    def make(**parts: Any) -> Settings:
        trainer = {"accelerator": "cpu", "logger": False, **parts.get("trainer", {})}
        data = {"batch_size": 4, "max_length": 64, "verdict_targets": None, "path": "a.jsonl"}
        federated = {
            "mode": "federated",
            "local_steps": 3,
            "local_epochs": None,
            "client_drift": None,
            "seed": 0,
            "clients_per_round": 2,
        }
        return shared_settings(
            model={**module.hparams, **parts.get("model", {})},
            data={**data, **parts.get("data", {})},
            federated={**federated, **parts.get("federated", {})},
            trainer=Trainer(**trainer, enable_checkpointing=False, enable_progress_bar=False),
            base=module.peft_model,
            tokenizer=tokenizer_of(tiny_gpt2),
        )

    return make


@pytest.mark.parametrize(
    ("part", "name", "value", "line"),
    [
        pytest.param("model", "rank", 8, "model.rank is 8 there and 16 here", id="rank"),
        pytest.param("model", "learning_rate", 1e-3, "model.learning_rate is 0.001 the", id="rate"),
        pytest.param("model", "target_modules", ["c_attn"], 'is ["c_attn"] there', id="modules"),
        pytest.param("data", "batch_size", 5, "data.batch_size is 5 there and 4 here", id="batch"),
        pytest.param(
            "data",
            "verdict_targets",
            VerdictTargets("llama-guard-3-1b"),
            'data.verdict_targets is {"categories": true',
            id="guard training",
        ),
        pytest.param(
            "federated", "local_steps", 4, "federated.local_steps is 4 there and 3", id="steps"
        ),
        pytest.param(
            "federated", "mode", "local", 'federated.mode is "local" there and "fed', id="mode"
        ),
        pytest.param(
            "federated", "client_drift", Scaffold(), 'client_drift is "Scaffold" there', id="drift"
        ),
        pytest.param("federated", "seed", 1, "seed_everything is 1 there and 0 here", id="seed"),
        pytest.param(
            "trainer",
            "precision",
            "bf16-mixed",
            'trainer.precision is "bf16-mixed"',
            id="precision",
        ),
    ],
)
def test_a_difference_that_matters_is_named_with_both_values(
    part: str, name: str, value: Any, line: str, settings: Callable[..., Settings]
) -> None:
    theirs = json.loads(json.dumps(settings(**{part: {name: value}})))
    found = differences(theirs, settings())
    assert len(found) == 1
    assert line in found[0]


def test_what_a_drift_was_made_with_is_compared_too(settings: Callable[..., Settings]) -> None:
    one, two = (settings(federated={"client_drift": FedProx(mu=mu)}) for mu in (0.1, 0.2))
    assert differences(one, two) == ["federated.client_drift.mu is 0.1 there and 0.2 here"]
    assert differences(one, settings()) == [
        'federated.client_drift is "FedProx" there and null here',
        "federated.client_drift.mu is 0.1 there and missing here",
    ]


def test_the_format_of_a_guard_is_compared_by_what_it_says_and_its_file_is_not_told(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    shipped = files("fedsafe.safety").joinpath("guards", "llama-guard-3-1b.yaml").read_text()
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text(shipped)
    other.write_text(shipped.replace("unsafe", "harmful"))
    told = [
        settings(data={"verdict_targets": VerdictTargets(name)})
        for name in ("llama-guard-3-1b", str(same), str(other))
    ]
    assert told[0] == told[1] != told[2]
    assert str(tmp_path) not in json.dumps(told)


def test_clipping_is_compared_where_there_is_any(settings: Callable[..., Settings]) -> None:
    norm = settings(trainer={"gradient_clip_val": 1.0})
    default = settings(trainer={"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"})
    assert norm == default
    by_value = settings(trainer={"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"})
    assert differences(norm, by_value) == [
        'trainer.gradient_clip_algorithm is "norm" there and "value" here'
    ]
    off = settings(trainer={"gradient_clip_val": 0.0})
    assert off == settings()


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "base", "elsewhere/base"),
        ("model", "compile", True),
        ("model", "gradient_checkpointing", True),
        ("data", "path", "other.jsonl"),
        ("data", "num_workers", 3),
        ("data", "validation_share", 0.5),
        ("federated", "clients_per_round", 7),
        ("trainer", "devices", 2),
        ("trainer", "accumulate_grad_batches", 4),
    ],
)
def test_what_is_a_nodes_own_business_may_differ(
    part: str, name: str, value: Any, settings: Callable[..., Settings]
) -> None:
    assert differences(settings(**{part: {name: value}}), settings()) == []


def test_a_base_is_told_by_its_weights(module: LoraLM, tiny_gpt2: Path, tiny_llama: Path) -> None:
    again = LoraLM(base=str(tiny_gpt2), rank=3, target_modules=["c_attn"])
    narrow = LoraLM(base=str(tiny_gpt2), dtype="bfloat16")
    other = LoraLM(base=str(tiny_llama))
    for each in (again, narrow, other):
        each.configure_model()
    digest = base_digest(module.peft_model)
    assert base_digest(again.peft_model) == digest
    assert base_digest(narrow.peft_model) == digest
    assert base_digest(other.peft_model) != digest
    assert base_digest(LoraLM(base=str(tiny_gpt2)).make_base()) == digest


def test_the_adapter_is_no_part_of_the_base(module: LoraLM) -> None:
    adapter, before = module.flat_adapter(), base_digest(module.peft_model)
    adapter.write(adapter.read() + 1)
    assert base_digest(module.peft_model) == before


def test_a_base_trained_further_is_another_one(tiny_gpt2: Path) -> None:
    base = LoraLM(base=str(tiny_gpt2)).make_base()
    before = base_digest(base)
    last: Any = list(base.parameters())[-1]
    last.data.mul_(1.5).add_(0.1)
    assert base_digest(base) != before


def test_a_base_that_cannot_be_told_counts_as_the_same(settings: Callable[..., Settings]) -> None:
    ours = settings()
    assert differences({**ours, "model.base": None}, ours) == []
    assert differences(ours, {**ours, "model.base": None}) == []
    assert len(differences({**ours, "model.base": "0123456789ab"}, ours)) == 1
    without = {name: value for name, value in ours.items() if name != "model.base"}
    assert differences(without, ours) == [
        f'model.base is missing there and "{ours["model.base"]}" here'
    ]


class _Packed(torch.nn.Module):
    """A layer in 4 bits, as far as its weights' type goes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)


class _InParts(torch.nn.Module):
    """A layer that ZeRO-3 has split."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(0))
        self.weight.ds_id = 7  # type: ignore[attr-defined]


@pytest.mark.parametrize("layer", [_Packed, _InParts], ids=["4 bits", "in parts"])
def test_a_base_in_4_bits_or_in_parts_has_no_digest(layer: type[torch.nn.Module]) -> None:
    assert base_digest(layer()) is None


def test_a_tokenizer_is_told_by_all_that_decides_its_tokens(
    tiny_gpt2: Path, tiny_llama: Path
) -> None:
    first, same, other = (tokenizer_of(folder) for folder in (tiny_gpt2, tiny_llama, tiny_gpt2))
    assert tokenizer_digest(first) == tokenizer_digest(same)  # the same files
    first("some text", truncation=True, max_length=2)
    assert tokenizer_digest(first) == tokenizer_digest(same)
    other.chat_template = "{{ messages }}"
    assert tokenizer_digest(other) != tokenizer_digest(first)


def test_versions_are_compared_without_their_device() -> None:
    versions = library_versions()
    assert versions.keys() == {"fedsafe", "torch", "transformers", "peft"}
    assert "+" not in versions["torch"]
    assert torch.__version__.startswith(versions["torch"])
    assert differences({**versions, "peft": "0.1"}, versions) == [
        f'peft is "0.1" there and "{versions["peft"]}" here'
    ]


def test_the_settings_are_json(settings: Callable[..., Settings], module: LoraLM) -> None:
    assert isinstance(module.peft_model, PeftModel)
    made = settings(model={"target_modules": ("c_attn", "c_proj")})
    assert json.loads(json.dumps(made)) == made
