import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from fedsafe.model.kv_buffer import KVBuffer


def states(rows: int, columns: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys, and values of another size."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 2, columns, 4, generator=generator),
        torch.randn(rows, 2, columns, 3, generator=generator),
    )


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


def test_it_holds_what_the_layer_of_transformers_holds() -> None:
    ours, theirs = KVBuffer(), DynamicLayer()
    for step, columns in enumerate((5, 1, 1, 3, 1)):
        new = states(2, columns, seed=step)
        assert ours.get_mask_sizes(columns) == theirs.get_mask_sizes(columns)
        assert same(ours.update(*new), theirs.update(*new))
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_token_is_written_in_place_while_there_is_room() -> None:
    layer = KVBuffer()
    layer.update(*states(2, 5))
    layer.reserve(8)
    before = layer.in_use[0].data_ptr()
    for _ in range(3):
        layer.update(*states(2, 1))
    assert layer.in_use[0].data_ptr() == before
    layer.update(*states(2, 1))
    assert layer.in_use[0].data_ptr() != before
    assert layer.length == 9


def test_rows_of_several_lengths_end_in_the_same_column() -> None:
    long, short = states(2, 5), states(1, 3, seed=1)
    keys, values = KVBuffer.stack([long, short], room=4).in_use
    assert same((keys[:2], values[:2]), long)
    assert same((keys[2:, :, 2:], values[2:, :, 2:]), short)
    assert not keys[2, :, :2].any()
    assert not values[2, :, :2].any()


def test_some_rows_stay_without_their_first_columns() -> None:
    keys, values = states(3, 5)
    layer = KVBuffer.stack([(keys, values)], room=2)
    layer.select(torch.tensor([0, 2]), 2)
    assert same(layer.in_use, (keys[[0, 2], :, 2:], values[[0, 2], :, 2:]))
    more = states(2, 1, seed=1)
    assert same(
        layer.update(*more),
        (
            torch.cat([keys[[0, 2], :, 2:], more[0]], 2),
            torch.cat([values[[0, 2], :, 2:], more[1]], 2),
        ),
    )


def test_a_row_is_copied_without_its_holes() -> None:
    keys, values = states(2, 5)
    layer = KVBuffer.stack([(keys, values)], room=2)
    copied = layer.row(1, torch.tensor([0, 1, 4]))
    layer.in_use[0].zero_()
    assert same(copied, (keys[1][:, [0, 1, 4]], values[1][:, [0, 1, 4]]))
