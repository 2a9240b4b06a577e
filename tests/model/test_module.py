import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from fedsafe.data.packing import (
    Pack,
    PreferenceBatch,
    SupervisedBatch,
    TrainingBatch,
    pack,
    pack_batch,
)
from fedsafe.federated.schedule import BatchKey
from fedsafe.model.identity import refuse_difference
from fedsafe.model.module import LoraLM

ModuleMaker = Callable[..., LoraLM]


def test_the_base_is_frozen_and_the_adapter_is_not(make_module: ModuleMaker, packed: Pack) -> None:
    module = make_module("llama")
    module(packed).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert (parameter.grad is not None) == ("lora_" in name)


def test_the_model_is_built_once(make_module: ModuleMaker) -> None:
    module = make_module("gpt2")
    built = module.peft_model
    module.configure_model()
    assert module.peft_model is built


def test_a_bfloat16_base_keeps_a_float32_adapter(make_module: ModuleMaker, packed: Pack) -> None:
    wide, narrow = make_module("llama"), make_module("llama", dtype="bfloat16")
    types = {p.dtype for n, p in narrow.named_parameters() if "lora_" not in n}
    assert types == {torch.bfloat16}
    adapter = narrow.flat_adapter()
    assert {p.dtype for p in adapter.parameters} == {torch.float32}
    vector = torch.full((adapter.num_params,), 1 + 2**-20)  # bfloat16 would round this to 1
    adapter.write(vector)
    assert torch.equal(adapter.read(), vector)
    wide.flat_adapter().write(vector)
    nll = narrow(packed)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, wide(packed), atol=0.3, rtol=0.1)
    nll.mean().backward()
    assert all(torch.isfinite(gradient).all() for gradient in adapter.gradients())


@pytest.mark.parametrize(("name", "kind"), [("adamw", AdamW), ("sgd", SGD)])
def test_the_optimizer_is_over_the_adapter_alone(
    make_module: ModuleMaker, name: str, kind: type[AdamW | SGD]
) -> None:
    module = make_module("gpt2", optimizer=name, learning_rate=0.25, weight_decay=0.125)
    optimizer = module.configure_optimizers()
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)
    expected = [id(p) for p in module.flat_adapter().parameters]
    assert [id(p) for p in group["params"]] == expected


def test_the_learning_rate_follows_the_schedule(make_module: ModuleMaker) -> None:
    module = make_module(
        "gpt2", learning_rate=0.1, lr_schedule="cosine", lr_floor=0.2, warmup_steps=2
    )
    rates = [
        module.learning_rate_at(round_=r, num_rounds=4, step=s) for r in (0, 2) for s in (0, 1)
    ]
    assert rates == pytest.approx([0.05, 0.1, 0.03, 0.06])


def test_settings_of_another_run_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"a was 1 and is 2; c was 'x' and is None\. Resume"):
        refuse_difference({"a": 1, "b": 0, "c": "x"}, {"a": 2, "b": 0})
    refuse_difference({"a": [1]}, {"a": [1]})


def test_a_checkpoint_of_another_model_is_refused(make_module: ModuleMaker) -> None:
    module = make_module("gpt2")
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert not checkpoint["state_dict"], "the rounds keep the adapter, and the base is frozen"
    module.on_load_checkpoint(checkpoint)
    other = make_module("gpt2", rank=2)
    with pytest.raises(ValueError, match=re.escape("model.rank was 4 and is 2")):
        other.on_load_checkpoint(checkpoint)


class _Optimizer:
    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{}]


def begin_batch(
    module: LoraLM, packed: Pack, monkeypatch: pytest.MonkeyPatch, **place: int
) -> float:
    """Announce a batch at some place of the run; returns the learning rate that it gets."""
    none = np.zeros(0, dtype=np.int64)
    run = {"num_rounds": 5, "num_steps": 4, "num_micro": 2}
    numbers = {"round": 0, "visit": 0, "client": 0, "step": 0, "micro": 0} | place
    key = BatchKey(**run, **numbers, samples=none, step_samples=none)
    optimizer = _Optimizer()
    trainer = type("Trainer", (), {"optimizers": [optimizer]})()
    monkeypatch.setattr(type(module), "trainer", trainer)
    module.on_train_batch_start(TrainingBatch(**vars(packed), key=key, normalizer=1), 0)
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def dropped(module: LoraLM, packed: Pack, monkeypatch: pytest.MonkeyPatch, **place: int) -> Tensor:
    """The losses of a batch at some place of the run, whatever was drawn before."""
    torch.rand(int(torch.randint(1, 9, ())))
    begin_batch(module, packed, monkeypatch, **place)
    return module(packed).detach()


def test_every_batch_gets_the_learning_rate_of_its_place(
    make_module: ModuleMaker, packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"learning_rate": 0.1, "lr_schedule": "cosine", "warmup_steps": 2}
    module = make_module("gpt2", **settings)
    rates = [begin_batch(module, packed, monkeypatch, round=r, step=1) for r in range(5)]
    assert rates == pytest.approx([0.1, 0.0904508, 0.0654508, 0.0345492, 0.0095492], abs=1e-6)
    assert begin_batch(module, packed, monkeypatch, round=0, step=0, micro=1) == 0.05


def test_dropout_depends_on_the_batchs_place_in_the_run_alone(
    make_module: ModuleMaker, packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module("llama", lora_dropout=0.4)
    module.train()
    place = {"round": 1, "client": 3, "step": 2}
    expected = dropped(module, packed, monkeypatch, **place)
    assert torch.equal(dropped(module, packed, monkeypatch, **place), expected)
    assert torch.equal(dropped(module, packed, monkeypatch, **place, visit=7), expected)
    for change in ({"round": 2}, {"client": 4}, {"step": 3}, {"micro": 1}):
        other = dropped(module, packed, monkeypatch, **(place | change))
        assert not torch.equal(other, expected), change
    reseeded = make_module("llama", lora_dropout=0.4, seed=1)
    reseeded.load_state_dict(module.state_dict())
    reseeded.train()
    assert not torch.equal(dropped(reseeded, packed, monkeypatch, **place), expected)


def test_the_probes_of_the_first_call_leave_no_trace(
    make_module: ModuleMaker, packed: Pack
) -> None:
    fresh, used = (make_module("llama", lora_dropout=0.4) for _ in range(2))
    used(packed)
    losses = []
    for module in (fresh, used):
        module.train()
        torch.manual_seed(0)
        losses.append(module(packed))
        assert module.peft_model.training
    assert torch.equal(*losses)
    fresh.eval()
    fresh._head_is_plain = None
    fresh(packed)
    assert not fresh.peft_model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give a number above 0"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001; give"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; give"),
        ({"lr_floor": 1.1}, "lr_floor is 1.1; give a share of the peak, 0 to 1"),
        ({"lr_floor": -0.1}, "lr_floor is -0.1; give"),
        ({"warmup_rounds": -1}, "warmup_rounds is -1; give 0 for none, or more"),
        ({"warmup_steps": -2}, "warmup_steps is -2; give 0 for none, or more"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; give 0 to below 1"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1; give"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LoraLM("gpt2", **settings)


def test_a_token_that_the_base_does_not_know_is_refused_trained_or_not(
    make_module: ModuleMaker, tiny_gpt2: Path
) -> None:
    trained = LoraLM(str(tiny_gpt2))
    trained.configure_model()
    trained.check_data(vocab_size=130, longest=9, largest_id=127)
    with pytest.raises(ValueError, match="a sample has token id 128, the base has 128 embeddings"):
        trained.check_data(vocab_size=130, longest=9, largest_id=128)
    with pytest.raises(ValueError, match="a sample has token id 64, the base has 64 embeddings"):
        make_module("llama").check_data(vocab_size=64, longest=9, largest_id=64)


def test_an_unknown_base_is_an_error_of_the_first_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no base model at"):
        LoraLM(str(tmp_path / "nowhere")).configure_model()


# ---- training steps: what a batch of each kind gives, outside a Trainer --------------------------

Samples = list[tuple[np.ndarray, np.ndarray]]


def preferences(
    module: LoraLM, samples: Samples, *, moved: bool = True, parts: int = 1, **settings: float
) -> list[PreferenceBatch]:
    """Two pairs of answers, in one batch or in two; the policy has moved on from the reference."""
    reference = module.answer_logprobs(pack(samples))
    if moved:
        adapter = module.flat_adapter()
        generator = torch.Generator().manual_seed(2)
        adapter.write(adapter.read() + 0.1 * torch.randn(adapter.num_params, generator=generator))
    counts = pack(samples).target_counts
    options: dict[str, Any] = {"beta": 0.3, "nll_weight": 0.5} | settings
    cuts = {1: [slice(0, 4)], 2: [slice(0, 2), slice(2, 4)]}[parts]
    return [
        PreferenceBatch(
            **vars(pack(samples[cut])),
            reference=reference[cut],
            num_pairs=2,
            num_chosen_tokens=counts[0] + counts[2],
            **options,
        )
        for cut in cuts
    ]


def loss_and_gradient(module: LoraLM, batches: Sequence[Pack]) -> tuple[Tensor, Tensor]:
    """Summed over the batches of a step."""
    parameters = module.flat_adapter().parameters
    loss, gradient = torch.zeros(()), torch.zeros(module.flat_adapter().num_params)
    for batch in batches:
        part = module.training_step(batch, 0)["loss"]  # type: ignore[arg-type]
        gradient += torch.cat([g.flatten() for g in torch.autograd.grad(part, parameters)])
        loss += part.detach()
    return loss, gradient


def place(num_micro: int) -> BatchKey:
    none = np.zeros(0, dtype=np.int64)
    return BatchKey(0, 1, 0, 0, 0, 1, 0, num_micro, none, none)


def test_only_a_clients_batch_is_scaled_by_the_parts_that_lightning_divides_by(
    make_module: ModuleMaker, packed: Pack
) -> None:
    module = make_module("llama")
    losses = module(packed).detach()
    supervised = module.training_step(SupervisedBatch(**vars(packed), normalizer=50), 0)
    torch.testing.assert_close(supervised["loss"], losses.sum() / 50)
    assert torch.equal(supervised["nll_sum"], losses.sum())
    assert not supervised["nll_sum"].requires_grad
    client = module.training_step(
        TrainingBatch(**vars(packed), normalizer=50, key=place(num_micro=3)), 0
    )
    assert torch.equal(client["loss"], supervised["loss"] * 3)
    assert torch.equal(client["nll_sum"], supervised["nll_sum"])


def test_a_clients_batch_without_samples_has_zero_loss_and_gradients(
    make_module: ModuleMaker,
) -> None:
    batch = pack_batch([], place(num_micro=1))  # type: ignore[arg-type]
    loss, gradient = loss_and_gradient(make_module("llama"), [batch])
    assert loss == 0
    assert not gradient.any()


def test_the_parts_of_a_supervised_step_add_up_to_it(
    make_module: ModuleMaker, samples: Samples, packed: Pack
) -> None:
    module = make_module("llama")
    normalizer = len(packed.targets)
    parts = [SupervisedBatch(**vars(pack(samples[i::2])), normalizer=normalizer) for i in (0, 1)]
    whole = loss_and_gradient(module, [SupervisedBatch(**vars(packed), normalizer=normalizer)])
    for mine, expected in zip(loss_and_gradient(module, parts), whole, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("nll_weight", [0.0, 0.5])
def test_the_parts_of_a_preference_step_add_up_to_it(
    make_module: ModuleMaker, samples: Samples, nll_weight: float
) -> None:
    one, other = make_module("llama"), make_module("llama")
    whole = loss_and_gradient(one, preferences(one, samples, nll_weight=nll_weight))
    parts = preferences(other, samples, parts=2, nll_weight=nll_weight)
    for mine, expected in zip(loss_and_gradient(other, parts), whole, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-6)


def test_a_step_from_the_reference_itself_costs_log_two_and_the_chosen_answers_nll(
    make_module: ModuleMaker, samples: Samples
) -> None:
    module = make_module("llama")
    [batch] = preferences(module, samples, moved=False, nll_weight=0.0)
    output = module.training_step(batch, 0)
    assert output["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert output["num_preferred"] == 0
    [weighted] = preferences(module, samples, moved=False, nll_weight=0.25)
    chosen_nll = -module.answer_logprobs(pack(samples[::2])).sum()
    expected = math.log(2) + 0.25 * chosen_nll.item() / weighted.num_chosen_tokens
    output = module.training_step(weighted, 0)
    assert output["loss"].item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(output["nll_sum"], chosen_nll)
    assert not output["nll_sum"].requires_grad


def test_pairs_are_counted_that_are_preferred_more_than_by_the_reference(
    make_module: ModuleMaker, samples: Samples
) -> None:
    module = make_module("llama")
    [batch] = preferences(module, samples, moved=False)
    here = batch.reference
    for offset, expected in (([0, 1, 0, 1], 2), ([1, 0, 0, 1], 1), ([1, 0, 2, 0], 0)):
        batch.reference = here + torch.tensor(offset)
        assert module.training_step(batch, 0)["num_preferred"] == expected


def test_steps_on_preferences_turn_the_policy_towards_the_chosen_answers(
    make_module: ModuleMaker, samples: Samples
) -> None:
    module = make_module("llama")
    [batch] = preferences(module, samples, moved=False, nll_weight=0.0)
    _, gradient = loss_and_gradient(module, [batch])
    module.flat_adapter().write(module.flat_adapter().read() - 1e-3 * gradient)
    output = module.training_step(batch, 0)
    assert output["loss"] < math.log(2)
    assert output["num_preferred"] == 2


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("sample", [0, 1], ids=["chosen", "rejected"])
def test_a_value_that_is_not_finite_reaches_the_loss(
    make_module: ModuleMaker, samples: Samples, sample: int, value: float
) -> None:
    module = make_module("llama")
    [batch] = preferences(module, samples, nll_weight=0.0)
    position = batch.predictors[sum(batch.target_counts[:sample])]

    def spoil(_: object, __: object, hidden: Tensor) -> Tensor:
        hidden[0, position, 0] = value
        return hidden

    module.peft_model.get_base_model().model.norm.register_forward_hook(spoil)
    assert not module.training_step(batch, 0)["loss"].isfinite()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_log_probabilities_of_answers_know_no_dropout_and_leave_the_mode_as_it_was(
    make_module: ModuleMaker, packed: Pack, training: bool
) -> None:
    plain, dropping = make_module("llama"), make_module("llama", lora_dropout=0.4)
    dropping.peft_model.train(training)
    logprobs = dropping.answer_logprobs(packed)
    assert dropping.peft_model.training == training
    assert not logprobs.requires_grad
    expected = [-part.sum() for part in plain(packed).detach().split(packed.target_counts)]
    torch.testing.assert_close(logprobs, torch.stack(expected))


def test_random_weights_are_drawn_on_the_cpu_wherever_the_model_will_be() -> None:
    """A GPU would draw others, and a base that is written down anew would be another one."""
    config = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    plain, elsewhere = (LoraLM("gpt2", from_config=config, rank=2) for _ in range(2))
    plain.configure_model()
    with torch.device("meta"):  # as a Trainer on a GPU does with its own
        elsewhere.configure_model()
    for (name, one), two in zip(plain.named_parameters(), elsewhere.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_base_with_an_adapter_on_its_embeddings_says_how_many_it_has(
    make_module: ModuleMaker,
) -> None:
    module = make_module("llama", target_modules=["embed_tokens", "q_proj"])
    module.check_data(vocab_size=64, longest=9, largest_id=63)
    with pytest.raises(ValueError, match="a sample has token id 1000000, the base has"):
        module.check_data(vocab_size=64, longest=9, largest_id=1_000_000)
