"""Next-token probabilities against a plain forward pass for each prompt."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedsafe.safety import next_token
from fedsafe.safety.next_token import (
    NextTokenScorer,
    common_prefix,
    packed_logits,
    padded_logits,
)

VOCABULARY = 64
EVERY = range(VOCABULARY)
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # far enough from zero that every token matters
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
_HYBRID = {
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "num_local_experts": 0,
    "shared_intermediate_size": 48,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "gpt2": ("gpt2", _GPT2 | _ENDS),
    "qwen3": ("qwen3", _LLAMA_LIKE | {"head_dim": 8}),
    "mistral, window 8": ("mistral", _LLAMA_LIKE | {"sliding_window": 8}),
    "mistral, window 64": ("mistral", _LLAMA_LIKE | {"sliding_window": 64}),
    "mistral, no window": ("mistral", _LLAMA_LIKE | {"sliding_window": None}),
    "gemma2, window 8": ("gemma2", _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 8}),
    "gemma2, window 64": ("gemma2", _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 64}),
    "bloom": ("bloom", _BLOOM | _ENDS),
    "hybrid": ("granitemoehybrid", _LLAMA_LIKE | _HYBRID),
}
WAYS = {
    "llama": (packed_logits, True),
    "gpt2": (packed_logits, True),
    "qwen3": (packed_logits, True),
    "mistral, window 8": (packed_logits, False),
    "mistral, window 64": (packed_logits, False),
    "mistral, no window": (packed_logits, True),
    "gemma2, window 8": (padded_logits, False),  # capped scores, which packed attention has not
    "gemma2, window 64": (padded_logits, True),
    "bloom": (padded_logits, True),  # an attention of its own
    "hybrid": (padded_logits, False),  # a state of its own
}
"""The way that each is scored, and whether a prefix of 30 tokens can be kept for it."""


@cache
def model_of(shape: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Tests leave it as it was."""
    family, settings = SHAPES[shape]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    return model.to(dtype).eval().requires_grad_(False)


def words(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


POLICY, OTHER_POLICY = words(30, 1), words(24, 2)
LONGER_POLICY = [*POLICY, *words(10, 3)]
PROMPTS = [
    [*POLICY, *words(5, 4)],
    words(9, 5),  # begins with none of them
    [*OTHER_POLICY, *words(40, 6)],
    [*POLICY, *words(60, 7)],  # beyond the window of 64
    POLICY,  # nothing follows
    [*LONGER_POLICY, *words(1, 8)],
    POLICY[:12],
    [*OTHER_POLICY, *words(3, 9)],
]
PREFIXES = {
    "none": [],
    "one": [POLICY],
    "several": [POLICY, OTHER_POLICY, LONGER_POLICY, POLICY],
}


def plain(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    rows = [model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in prompts]
    return torch.stack(rows).float().softmax(-1)


def scorer_of(shape: str = "llama", **settings: Any) -> NextTokenScorer:
    defaults: dict[str, Any] = {"prefixes": [POLICY], "max_tokens": 100}
    return NextTokenScorer(model_of(shape), None, **defaults | settings)


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the token ids of each forward pass inside the block."""
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        yield shapes
    finally:
        hook.remove()


@pytest.mark.oracle
@pytest.mark.parametrize("prefixes", list(PREFIXES))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_probabilities_are_those_of_single_forward_passes(shape: str, prefixes: str) -> None:
    model = model_of(shape)
    expected = plain(model, PROMPTS)
    assert expected.std(0).max() > 1e-2, "the prompts do not differ"
    for max_tokens in (1, 100, 10_000):
        scorer = scorer_of(shape, prefixes=PREFIXES[prefixes], max_tokens=max_tokens)
        found = scorer.label_probabilities(PROMPTS, EVERY)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    alone = [scorer.label_probabilities([ids], EVERY) for ids in PROMPTS]
    torch.testing.assert_close(torch.cat(alone), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_each_family_is_scored_in_the_fastest_way_that_is_right(
    shape: str, dtype: torch.dtype
) -> None:
    model = model_of(shape, dtype)
    scorer = NextTokenScorer(model, None, prefixes=[POLICY], max_tokens=100)
    way, shares = WAYS[shape]
    assert (scorer._way, len(scorer._prefixes)) == (way, int(shares))
    torch.testing.assert_close(  # bfloat16 has 3 digits
        scorer.label_probabilities(PROMPTS, EVERY), plain(model, PROMPTS), rtol=0, atol=0.03
    )


def test_a_prefix_is_read_once_and_not_again() -> None:
    model = model_of("llama")
    scorer = scorer_of(max_tokens=10_000)
    with watched(model) as shapes:
        scorer.label_probabilities(PROMPTS, [3])
    begin = [ids for ids in PROMPTS if ids[:30] == POLICY and len(ids) > 30]
    whole = [ids for ids in PROMPTS if ids not in begin]
    assert shapes == [(1, sum(len(ids) - 30 for ids in begin)), (1, sum(map(len, whole)))]


@pytest.mark.parametrize("shape", ["llama", "gemma2, window 64"])
@pytest.mark.parametrize("max_tokens", [1, 40, 100])
def test_batches_stay_within_the_budget(shape: str, max_tokens: int) -> None:
    model, asked = model_of(shape), [words(n, n) for n in (3, 41, 8, 39, 12, 3, 17)]
    scorer = scorer_of(shape, max_tokens=max_tokens)
    with watched(model) as shapes:
        scorer.label_probabilities(asked, [3])
    lengths = {len(ids) for ids in asked}
    for rows, columns in shapes:
        assert rows * columns <= max_tokens or (rows == 1 and columns in lengths)
    assert sum(rows * columns for rows, columns in shapes) >= sum(map(len, asked))


@pytest.mark.parametrize("shape", ["llama", "gemma2, window 64"])
def test_the_same_list_gives_the_same_bits_whatever_was_asked_before(shape: str) -> None:
    scorer = scorer_of(shape, prefixes=PREFIXES["several"])
    first = scorer.label_probabilities(PROMPTS, EVERY)
    assert torch.equal(scorer.label_probabilities(PROMPTS, EVERY), first)
    scorer.label_probabilities([[*POLICY, *words(77, 10)]], EVERY)
    assert torch.equal(scorer.label_probabilities(PROMPTS, EVERY), first)
    fresh = scorer_of(shape, prefixes=PREFIXES["several"])
    fresh.label_probabilities(PROMPTS[::-1], EVERY)
    assert torch.equal(fresh.label_probabilities(PROMPTS, EVERY), first)


def test_an_error_in_the_middle_leaves_prefix_and_attention_as_they_were() -> None:
    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("out of memory")

    model, scorer = model_of("llama"), scorer_of()
    expected = scorer.label_probabilities(PROMPTS, EVERY)
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            scorer.label_probabilities(PROMPTS, EVERY)
    finally:
        hook.remove()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(scorer.label_probabilities(PROMPTS, EVERY), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_models_attention_is_restored(attention: str) -> None:
    model = model_of("llama")
    model.set_attn_implementation(attention)
    try:
        found = scorer_of().label_probabilities(PROMPTS, EVERY)
        assert model.config._attn_implementation == attention
        torch.testing.assert_close(found, plain(model, PROMPTS), rtol=0, atol=1e-6)
    finally:
        model.set_attn_implementation("sdpa")


def test_only_the_labels_asked_for_are_given_in_their_order_as_float32() -> None:
    model = model_of("llama", torch.bfloat16)
    scorer = NextTokenScorer(model, None, prefixes=[POLICY], max_tokens=100)
    every = scorer.label_probabilities(PROMPTS, EVERY)
    assert every.dtype == torch.float32
    torch.testing.assert_close(every.sum(1), torch.ones(len(PROMPTS)))
    assert torch.equal(scorer.label_probabilities(PROMPTS, [40, 7]), every[:, [40, 7]])


def test_a_prefix_of_a_few_tokens_is_not_worth_a_cache() -> None:
    assert scorer_of(prefixes=[POLICY[:15]])._prefixes == []
    assert [len(p.ids) for p in scorer_of(prefixes=[POLICY[:16]])._prefixes] == [16]


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_LLAMA_LIKE))
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="LlamaForCausalLM computes NaN; try dtype float32"):
        NextTokenScorer(model.eval(), None, max_tokens=100)


def test_a_model_whose_batches_are_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("packed_logits", "padded_logits"):
        right = getattr(next_token, name)
        monkeypatch.setattr(next_token, name, lambda *args, right=right: right(*args).flip(0))
    with pytest.raises(ValueError, match="LlamaForCausalLM gives other probabilities to prompts"):
        scorer_of()


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2]], [1, 2]),
        ([[1, 2], [3]], []),
        ([[1, 2], [1, 2]], [1, 2]),
    ],
    ids=["some", "nothing", "all"],
)
def test_the_common_prefix_is_what_all_begin_with(
    prompts: list[list[int]], expected: list[int]
) -> None:
    assert common_prefix(prompts) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_way_in_which_prompts_see_each_other_a_little_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    def leaking(model: Any, prefix: Any, prompts: Any) -> Tensor:
        logits = packed_logits(model, prefix, prompts)
        return logits + 0.02 * logits.abs().max() * (prompts[0][-1] == 8)

    model = model_of("llama", dtype)
    monkeypatch.setattr(next_token, "packed_logits", leaking)
    way, _ = next_token._find_way(model)
    assert way is padded_logits
