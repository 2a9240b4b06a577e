from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import nn

from fedsafe.model.flat_adapter import WholeAdapter
from fedsafe.model.module import LoraLM

ModuleMaker = Callable[..., LoraLM]


def test_reading_gives_back_what_was_written(make_module: ModuleMaker) -> None:
    module = make_module("llama")
    adapter = module.flat_adapter()
    vector = torch.randn(adapter.num_params)
    adapter.write(vector)
    assert torch.equal(adapter.read(), vector)
    tensors = get_peft_model_state_dict(module.peft_model, save_embedding_layers=False)
    assert torch.equal(torch.cat([t.flatten() for t in tensors.values()]), vector)


def test_a_read_vector_is_a_copy(make_module: ModuleMaker) -> None:
    adapter = make_module("gpt2").flat_adapter()
    before = adapter.read()
    kept = before.clone()
    adapter.write(torch.zeros_like(before))
    assert torch.equal(before, kept)


def test_writing_leaves_the_base_alone(make_module: ModuleMaker) -> None:
    module = make_module("gpt2")
    frozen = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    module.flat_adapter().write(torch.ones(module.flat_adapter().num_params))
    after = dict(module.named_parameters())
    assert frozen
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())


def test_views_share_the_vectors_memory() -> None:
    model = nn.Linear(3, 2)
    adapter = WholeAdapter(model.named_parameters())
    vector = torch.zeros(8)
    weight, bias = adapter.views(vector)
    weight[1, 2], bias[0] = 5.0, 7.0
    assert vector.tolist() == [0, 0, 0, 0, 0, 5, 7, 0]


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter; add LoRA"):
        WholeAdapter(nn.Linear(3, 2).requires_grad_(False).named_parameters())


def test_a_parameter_outside_the_loss_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"2 adapter tensors got no gradient.* unused.weight"):
        WholeAdapter(model.named_parameters()).gradients()


def test_a_read_gradient_is_the_parameters_own_and_a_written_one_replaces_it() -> None:
    model = nn.Linear(3, 2)
    model(torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    adapter = WholeAdapter(model.named_parameters())
    assert adapter.read_gradient().tolist() == [1, 2, 3, 1, 2, 3, 1, 1]
    adapter.write_gradient(torch.arange(8.0))
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[0, 1, 2], [3, 4, 5]]


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, times: int) -> None:
    for number in range(times):
        optimizer.zero_grad()
        (model(torch.full((1, 3), number + 1.0)) ** 2).sum().backward()
        optimizer.step()


def test_an_optimizer_that_got_back_its_state_goes_on_as_if_nothing_happened() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    stepped(model, optimizer, 3)
    adapter = WholeAdapter(model.named_parameters())
    vector, state = adapter.read(), adapter.optimizer_state(optimizer)
    stepped(model, optimizer, 2)
    expected = adapter.read()

    adapter.write(vector)
    another = torch.optim.AdamW(model.parameters(), lr=0.1)
    adapter.load_optimizer_state(another, state)
    stepped(model, another, 2)
    assert torch.equal(adapter.read(), expected)


def test_a_forgetful_optimizer_has_no_state_and_a_state_of_nothing_is_one_of_a_new_optimizer() -> (
    None
):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    adapter = WholeAdapter(model.named_parameters())
    assert adapter.optimizer_state(optimizer) == {}
    stepped(model, optimizer, 1)
    assert set(adapter.optimizer_state(optimizer)) == {"step", "exp_avg", "exp_avg_sq"}
    adapter.load_optimizer_state(optimizer, {})
    assert not optimizer.state
    stepped(model, optimizer, 1)
    adapter.forget(optimizer)
    assert adapter.optimizer_state(optimizer) == {}
