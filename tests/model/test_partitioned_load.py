"""Linear layers of a step under ZeRO-3; how a model is split: `strategies/test_zero_models`."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsafe.model.partitioned_load import drops_frozen_weights, require_gradients


def frozen() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 6, bias=False).requires_grad_(False)


def inputs() -> Tensor:
    return torch.arange(24.0).view(1, 3, 8).requires_grad_()


def test_a_frozen_weight_that_is_put_away_and_brought_back_is_the_one_that_counts() -> None:
    """A copy of it in the graph, which would keep the memory of the first, would not notice."""
    layer, x = frozen(), inputs()
    weight = layer.weight.detach().clone()
    with drops_frozen_weights():
        output = layer(x)
    layer.weight.data = torch.empty(0)
    layer.weight.data = 2 * weight
    output.sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 3, 6) @ (2 * weight))


def test_gradients_have_the_bits_of_torch() -> None:
    trained = nn.Linear(6, 4)
    found = []
    for keeps in (True, False):
        layer, x = frozen(), inputs()
        trained.zero_grad()
        if keeps:
            loss = trained(layer(x)).square().sum()
        else:
            with drops_frozen_weights():
                loss = trained(layer(x)).square().sum()
        loss.backward()
        found.append([loss.detach(), x.grad, trained.weight.grad, trained.bias.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_afterwards_linear_layers_are_torchs() -> None:
    plain = functional.linear
    with drops_frozen_weights():
        assert functional.linear is not plain
    assert functional.linear is plain


def test_the_first_layers_input_has_a_gradient_until_it_is_not_needed() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Identity(), nn.Identity()]))
    first = model[0][0]
    handle = require_gradients(model)
    assert first(torch.zeros(2)).requires_grad
    with torch.no_grad():
        assert not first(torch.zeros(2)).requires_grad
    handle.remove()
    assert not first(torch.zeros(2)).requires_grad
