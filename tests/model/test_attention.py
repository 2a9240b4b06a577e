from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsafe.model import attention
from fedsafe.model.attention import packed_attention

LENGTHS = [3, 1, 6]


def qkv(*, heads: int = 4, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    total, size = sum(LENGTHS), 8
    query = torch.randn(1, heads, total, size, generator=generator)
    key, value = (torch.randn(1, kv_heads, total, size, generator=generator) for _ in range(2))
    return query, key, value


def by_loops(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None
) -> Tensor:
    """Softmax attention, one query position at a time; shape ``(1, T, H, D)``."""
    heads, total = query.shape[1:3]
    group = heads // key.shape[1]
    starts = [sum(LENGTHS[:i]) for i, n in enumerate(LENGTHS) for _ in range(n)]
    output = torch.empty(1, total, heads, query.shape[3])
    for head in range(heads):
        for t in range(total):
            first = starts[t] if window is None else max(starts[t], t - window + 1)
            keys, values = (x[0, head // group, first : t + 1] for x in (key, value))
            output[0, t, head] = torch.softmax(keys @ query[0, head, t] * scaling, 0) @ values
    return output


@pytest.mark.oracle
@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_each_position_attends_to_the_past_of_its_own_sample(
    window: int | None, kv_heads: int, scaling: float | None
) -> None:
    query, key, value = qkv(kv_heads=kv_heads)
    output, weights = packed_attention(
        nn.Module(),
        query,
        key,
        value,
        None,
        scaling=scaling,
        segment_lengths=LENGTHS,
        sliding_window=window,
    )
    expected = by_loops(query, key, value, scaling=scaling or 8**-0.5, window=window)
    assert weights is None
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_dropout_drops_whole_attention_weights() -> None:
    query, key, _ = qkv()
    torch.manual_seed(0)
    output, _ = packed_attention(
        nn.Module(), query, key, torch.ones_like(key), None, dropout=0.5, segment_lengths=LENGTHS
    )
    first = output[0, 0, :, 0]  # one weight of 1, dropped or doubled
    assert set(first.tolist()) <= {0.0, 2.0}
    assert not torch.allclose(output, torch.ones(()))


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_call_without_boundaries_or_with_a_mask_is_refused(with_mask: bool) -> None:
    query, key, value = qkv()
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool) if with_mask else None
    lengths = LENGTHS if with_mask else None
    with pytest.raises(ValueError, match=r"needs segment_lengths .*set_attn_implementation"):
        packed_attention(nn.Module(), query, key, value, mask, segment_lengths=lengths)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_it_cannot_do_is_refused(name: str) -> None:
    query, key, value = qkv()
    with pytest.raises(ValueError, match=f"no {name}, which Linear asks for; set model.attention"):
        packed_attention(
            nn.Linear(1, 1), query, key, value, None, segment_lengths=LENGTHS, **{name: 1.0}
        )


# ---- a prefix that all samples share -------------------------------------------------------------

PREFIX = 5


def by_dense_eager(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """One dense mask over prefix and pack, in float64; shape ``(1, T, H, D)``."""
    segment = torch.tensor([-1] * PREFIX + [i for i, n in enumerate(LENGTHS) for _ in range(n)])
    position = torch.arange(len(segment))
    own = segment[PREFIX:, None] == segment[None, :]
    past = position[PREFIX:, None] >= position[None, :]
    seen = (segment[None, :] < 0) | (own & past)
    query, key, value = (each.double() for each in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def with_prefix(kv_heads: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    query, key, value = qkv(kv_heads=kv_heads)
    generator = torch.Generator().manual_seed(1)
    before = [torch.randn(1, kv_heads, PREFIX, 8, generator=generator) for _ in range(2)]
    parts = [query, torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)]
    return [each.to(dtype) for each in parts]


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-6),
        (torch.float64, 1e-12),
        (torch.bfloat16, 0.02),  # the plain products; 3 digits
        (torch.float16, 0.004),
    ],
    ids=["float32", "float64", "bfloat16", "float16"],
)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_each_sample_sees_the_prefix_and_its_own_past(
    dtype: torch.dtype, tolerance: float, kv_heads: int, scaling: float | None
) -> None:
    query, key, value = with_prefix(kv_heads, dtype)
    output, weights = packed_attention(
        nn.Module(), query, key, value, None, scaling=scaling, segment_lengths=LENGTHS
    )
    expected = by_dense_eager(query, key, value, scaling=scaling or 8**-0.5)
    assert weights is None
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.oracle
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_plain_products_and_the_fused_kernel_agree(kv_heads: int) -> None:
    query, key, value = with_prefix(kv_heads)
    before = [each.clone() for each in (query, key, value)]
    plain = attention._plain_attention(query[:, :, :6], key[:, :, :11], value[:, :, :11], 0.7)
    fused = attention._fused_attention(query[:, :, :6], key[:, :, :11], value[:, :, :11], 0.7)
    assert plain.shape == fused.shape == (1, 6, 4, 8)
    torch.testing.assert_close(plain, fused, atol=1e-6, rtol=1e-5)
    assert all(map(torch.equal, before, (query, key, value)))


def test_a_prefix_and_a_sliding_window_are_refused_together() -> None:
    query, key, value = with_prefix()
    with pytest.raises(ValueError, match="a shared prefix and a sliding window of 64 tokens do no"):
        packed_attention(
            nn.Module(), query, key, value, None, segment_lengths=LENGTHS, sliding_window=64
        )


@pytest.mark.parametrize(
    ("owner", "name", "prefix"),
    [(nn.functional, "scaled_dot_product_attention", 0), (attention, "_fused_attention", 2)],
    ids=["alone", "behind a prefix"],
)
def test_cudnn_is_not_asked_to_plan_for_every_length(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, prefix: int
) -> None:
    enabled: list[bool] = []
    attend = getattr(owner, name)

    def spied(*args: Any, **kwargs: Any) -> Tensor:
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(owner, name, spied)
    query, key, value = qkv()
    lengths = [sum(LENGTHS) - prefix]
    packed_attention(nn.Module(), query[:, :, prefix:], key, value, None, segment_lengths=lengths)
    assert enabled == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


# ---- one kernel for all segments; tests/model/test_gpu.py has the real one -----------------------


def kernel_by_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """What the flash kernel computes, by dense masks; shape ``(T, H, D)``."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert longest_query == query_ends.diff().max()
    assert longest_key == key_ends.diff().max()
    assert dropout == 0.0
    outputs = []
    for i in range(len(query_ends) - 1):
        q = query[query_ends[i] : query_ends[i + 1]]
        k, v = (each[key_ends[i] : key_ends[i + 1]] for each in (key, value))
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (distance >= 0) & (distance < (window or len(k)))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scaling or q.shape[2] ** -0.5)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_has_flash_kernel", lambda _: True)
    monkeypatch.setattr(attention, "_flash_kernel", kernel_by_segments)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("window", [None, 2, 100])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_one_kernel_is_told_where_segments_end(window: int | None, kv_heads: int) -> None:
    query, key, value = qkv(kv_heads=kv_heads)
    found, _ = packed_attention(
        nn.Module(), query, key, value, None, segment_lengths=LENGTHS, sliding_window=window
    )
    expected = by_loops(query, key, value, scaling=8**-0.5, window=window)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_one_kernel_is_given_the_prefix_before_each_segment(kv_heads: int) -> None:
    query, key, value = with_prefix(kv_heads)
    found, _ = packed_attention(
        nn.Module(), query, key, value, None, scaling=0.7, segment_lengths=LENGTHS
    )
    expected = by_dense_eager(query, key, value, scaling=0.7)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_ends_found_in_inference_mode_can_be_used_in_training() -> None:
    attention._ends.cache_clear()
    with torch.inference_mode():
        ends = attention._ends((3, 1, 6), torch.device("cpu"))
    assert not ends.is_inference()
    assert ends.tolist() == [0, 3, 4, 10]
    assert attention._ends((3, 1, 6), torch.device("cpu")) is ends  # once for all layers


def test_a_cpu_has_no_such_kernel() -> None:
    assert not attention._has_flash_kernel(torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16))
