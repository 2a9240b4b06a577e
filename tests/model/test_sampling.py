import numpy as np
import pytest
import torch

from fedsafe.model.sampling import checked, draws, next_tokens


def test_a_row_draws_the_same_numbers_whatever_is_beside_and_behind_them() -> None:
    alone = draws([(7, 1)], 5)
    together = draws([3, (7, 1), (7, 2)], 9)
    assert torch.equal(together[1, :5], alone[0])
    assert not torch.equal(together[1], together[2])
    assert ((together >= 0) & (together < 1)).all()


def test_without_draws_it_is_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.0]])
    assert next_tokens(logits, None, 0.0).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_come_as_often_as_the_model_says(temperature: float) -> None:
    logits = torch.tensor([1.0, -0.5, 2.0, 0.0])
    numbers = (torch.arange(100_000) + 0.5) / 100_000
    tokens = next_tokens(logits.expand(100_000, 4), numbers, temperature)
    shares = torch.bincount(tokens, minlength=4) / 100_000
    assert torch.allclose(shares, (logits / temperature).softmax(-1), atol=1e-4)


def test_a_token_without_probability_is_never_drawn() -> None:
    never = -torch.inf
    logits = torch.tensor([[never, 0.0, never, 0.0, never]])
    highest = np.nextafter(np.float32(1), np.float32(0))
    for number, expected in ((0.0, 1), (0.4999, 1), (0.5, 3), (float(highest), 3)):
        assert next_tokens(logits, torch.tensor([number]), 1.0).item() == expected


def test_the_highest_draw_falls_on_a_token_though_the_sums_are_rounded() -> None:
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(0))
    highest = torch.full((200,), float(np.nextafter(np.float32(1), np.float32(0))))
    assert next_tokens(logits, highest, 1.0).max() < 5000


def test_half_precision_is_sampled_in_full() -> None:
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    numbers = torch.rand(50, generator=torch.Generator().manual_seed(1))
    expected = next_tokens(logits.float(), numbers, 1.0)
    assert torch.equal(next_tokens(logits, numbers, 1.0), expected)


@pytest.mark.parametrize("number", [None, 0.5], ids=["likeliest", "sampled"])
def test_a_model_that_computes_nan_is_an_error(number: float | None) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])
    with pytest.raises(ValueError, match="computes NaN or infinite logits"):
        checked(next_tokens(logits, None if number is None else torch.full((2,), number), 1.0))
