"""Continuations of token ids, compared with transformers' `generate` one prompt at a time."""

import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from fedsafe.model import decoding, row_batch
from fedsafe.model.continuation import Continuation, Memory, Prompt
from fedsafe.model.decoding import continue_all, has_plain_memory
from fedsafe.model.generation import generating
from fedsafe.model.grouping import of_like_length
from fedsafe.model.kv_buffer import KVBuffer

ModelMaker = Callable[..., PreTrainedModel]
PLAIN = ("gpt2", "llama", "phi")
REREADING = ("mistral", "gemma2", "bloom", "mamba", "gpt_neo")
NO_ENDS: frozenset[int] = frozenset()


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 64, size=length).tolist() for length in lengths]


IDS = random_ids(3, 11, 7, 20, 5, 7)


def one_by_one(
    model: PreTrainedModel, prompts: Sequence[list[int]], *, ends: Sequence[int] = ()
) -> list[list[int]]:
    """The likeliest 12 tokens after each prompt by `generate`."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(ends) or None,
            pad_token_id=0,
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


def go_on(model: PreTrainedModel, prompts: Sequence[Prompt], **settings) -> list[Continuation]:
    defaults = {"ends": NO_ENDS, "max_new_tokens": 12, "remember": True}
    return continue_all(model, prompts, **defaults | settings)


def second_turns(first: Sequence[Continuation]) -> list[Prompt]:
    """More is said in each, from 1 to 6 tokens."""
    said = random_ids(*range(1, len(first) + 1), seed=1)
    return [
        Prompt([*ids, *each.ids, *more], place, Memory(each.memory.ids, [*each.memory.layers]))
        for place, (ids, each, more) in enumerate(zip(IDS, first, said, strict=True))
    ]


@pytest.mark.parametrize("family", PLAIN + REREADING)
def test_whether_a_model_keeps_plain_memory_is_told_by_its_kind(
    make_model: ModelMaker, family: str
) -> None:
    assert has_plain_memory(make_model(family)) == (family in PLAIN)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "linear"])
def test_angles_that_the_length_changes_are_not_kept(make_model: ModelMaker, kind: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **factors}
    model = make_model("llama", rope_parameters=rope, max_position_embeddings=16)
    assert has_plain_memory(model) == (kind == "linear")


@pytest.mark.oracle
def test_a_row_is_turned_by_its_own_length(make_model: ModelMaker) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [9.0] * 4,
        "original_max_position_embeddings": 16,  # the angles change beyond
    }
    model = make_model("llama", rope_parameters=rope)
    found = go_on(model, [Prompt(ids) for ids in IDS])
    assert [each.ids for each in found] == one_by_one(model, IDS)


@pytest.mark.oracle
@pytest.mark.parametrize("family", PLAIN + REREADING)
def test_two_greedy_turns_are_those_of_generate_one_by_one(
    make_model: ModelMaker, family: str
) -> None:
    model = make_model(family)
    first = go_on(model, [Prompt(ids) for ids in IDS])
    assert [each.ids for each in first] == one_by_one(model, IDS)
    prompts = second_turns(first)
    second = go_on(model, prompts)
    assert [each.ids for each in second] == one_by_one(model, [each.ids for each in prompts])
    assert len({tuple(each.ids) for each in second}) > 1


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_that_end_early_are_those_of_generate_one_by_one(
    make_model: ModelMaker, family: str
) -> None:
    model = make_model(family)
    ends = sorted({ids[2 + place] for place, ids in enumerate(one_by_one(model, IDS)[:3])})
    found = go_on(model, [Prompt(ids) for ids in IDS], ends=frozenset(ends))
    assert [each.ids for each in found] == one_by_one(model, IDS, ends=ends)
    assert len({len(each.ids) for each in found}) > 2
    assert [each.finished for each in found] == [each.ids[-1] in ends for each in found]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "mamba"])
def test_a_sampled_row_does_not_depend_on_the_rows_beside_it(
    make_model: ModelMaker, family: str
) -> None:
    model = make_model(family)
    prompts = [Prompt(ids, (5, place)) for place, ids in enumerate(IDS)]
    settings = {"temperature": 1.0, "ends": frozenset({2, 9, 17, 33})}
    first = go_on(model, prompts, **settings)
    second = go_on(model, second_turns(first), **settings)
    for max_rows in (1, 4):
        again = go_on(model, prompts, max_rows=max_rows, **settings)
        assert [each.ids for each in again] == [each.ids for each in first]
        again = go_on(model, second_turns(first), max_rows=max_rows, **settings)
        assert [each.ids for each in again] == [each.ids for each in second]
    assert len({len(each.ids) for each in first}) > 1


def test_rereading_draws_the_same_tokens(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    prompts = [Prompt(ids, place) for place, ids in enumerate(IDS)]
    expected = go_on(model, prompts, temperature=1.0)
    monkeypatch.setattr(decoding, "has_plain_memory", lambda model: False)
    assert [each.ids for each in go_on(model, prompts, temperature=1.0)] == [
        each.ids for each in expected
    ]


def test_rereading_leaves_the_checkpoints_own_settings_out(make_model: ModelMaker) -> None:
    model = make_model("mistral")
    expected = go_on(model, [Prompt(ids) for ids in IDS])
    model.generation_config.update(repetition_penalty=9.0, suppress_tokens=expected[0].ids)
    own = model.generation_config
    assert go_on(model, [Prompt(ids) for ids in IDS]) == expected
    assert model.generation_config is own
    assert own.repetition_penalty == 9.0


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_model_that_computes_nan_is_an_error(make_model: ModelMaker, family: str) -> None:
    model = make_model(family)
    model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="computes NaN or infinite logits"):
        go_on(model, [Prompt(ids) for ids in IDS])


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 2.0], ids=["at_once", "some", "never"])
def test_memory_is_what_the_model_computes_of_a_row_alone(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(row_batch, "_LEAVE_SHARE", share)
    model = make_model("llama")
    first = go_on(model, [Prompt(ids) for ids in IDS], ends=frozenset(range(0, 64, 5)))
    second = go_on(model, second_turns(first))
    for prompt, found in zip(second_turns(first), second, strict=True):
        assert found.memory.ids == (*prompt.ids, *found.ids[:-1])
        read = torch.tensor([found.memory.ids])
        expected = model(read, use_cache=True).past_key_values.layers
        for layer, (keys, values) in zip(expected, found.memory.layers, strict=True):
            assert torch.allclose(keys, layer.keys[0], atol=1e-5)
            assert torch.allclose(values, layer.values[0], atol=1e-5)


def test_what_was_read_is_not_read_again(make_model: ModelMaker) -> None:
    model = make_model("llama")
    first = go_on(model, [Prompt(ids) for ids in IDS])
    assert [each.num_read for each in first] == [len(ids) for ids in IDS]
    # the last token of each answer was never fed
    assert [each.num_read for each in go_on(model, second_turns(first))] == [2, 3, 4, 5, 6, 7]


def test_memory_is_used_up_to_where_it_differs(make_model: ModelMaker) -> None:
    model = make_model("llama")
    [kept] = go_on(model, [Prompt(IDS[1])])
    changed = [*IDS[1][:6], (IDS[1][6] + 1) % 64, *IDS[1][7:]]
    for ids, num_read in ((changed, 5), (IDS[1], 1), (IDS[1][:4], 1), (IDS[3], 20)):
        memory = Memory(kept.memory.ids, [*kept.memory.layers])
        [found] = go_on(model, [Prompt(ids, memory=memory)])
        assert found.num_read == num_read
        assert [found.ids] == one_by_one(model, [ids])


def test_nothing_is_remembered_unless_asked(make_model: ModelMaker) -> None:
    [found] = go_on(make_model("llama"), [Prompt(IDS[0])], remember=False)
    assert found.memory == Memory((), [])


def test_a_memory_is_freed_as_the_batch_takes_it(make_model: ModelMaker) -> None:
    model = make_model("llama")
    prompts = second_turns(go_on(model, [Prompt(ids) for ids in IDS]))
    prompts[0] = Prompt([9, *prompts[0].ids], memory=prompts[0].memory)  # of no use
    kept = [weakref.ref(keys) for prompt in prompts for keys, _ in prompt.memory.layers]
    alive: list[int] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, args: alive.append(sum(each() is not None for each in kept))
    )
    go_on(model, prompts)
    assert len(kept) == 12
    assert not any(alive)


def test_a_memory_that_was_taken_is_read_anew(make_model: ModelMaker) -> None:
    model = make_model("llama")
    prompts = second_turns(go_on(model, [Prompt(ids) for ids in IDS]))
    first, again = go_on(model, prompts), go_on(model, prompts)
    assert [each.ids for each in again] == [each.ids for each in first]
    assert [each.num_read for each in again] == [len(each.ids) for each in prompts]


def test_a_batch_grows_by_steps_to_what_it_can_need(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacities: list[int] = []
    reserve = KVBuffer.reserve

    def count(layer: KVBuffer, capacity: int) -> None:
        capacities.append(capacity)
        reserve(layer, capacity)

    monkeypatch.setattr(KVBuffer, "reserve", count)
    model = make_model("llama", max_position_embeddings=1024, num_hidden_layers=1)
    go_on(model, [Prompt(ids) for ids in random_ids(300, 290)], max_new_tokens=200)
    assert capacities == [300, 364, 428, 492, 500]


def test_rows_that_are_over_leave_the_batch(make_model: ModelMaker) -> None:
    model = make_model("gpt2")
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda model, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    prompts = [Prompt(IDS[1], seed) for seed in range(20)]
    ends = frozenset(range(0, 64, 5))
    found = go_on(model, prompts, ends=ends, temperature=1.0)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    assert sum(sizes) < 1.6 * sum(len(each.ids) for each in found)


def test_prompts_of_a_stateful_model_are_not_padded(make_model: ModelMaker) -> None:
    model = make_model("mamba")
    read: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda model, args, inputs: read.extend(inputs["input_ids"].tolist()), with_kwargs=True
    )
    go_on(model, [Prompt(ids) for ids in IDS])
    assert sorted(row for row in read if len(row) > 1) == sorted(IDS)


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gpt_neo"])
def test_each_row_goes_on_to_its_own_last_position(make_model: ModelMaker, family: str) -> None:
    model = make_model(family, max_position_embeddings=64)
    prompts = [Prompt(ids) for ids in random_ids(63, 60, 5, 30)]
    found = go_on(model, prompts, max_new_tokens=10)
    assert [len(each.ids) for each in found] == [1, 4, 10, 10]
    assert not any(each.finished for each in found)
    longer = go_on(model, prompts[:2])
    assert [each.ids for each in longer] == [each.ids for each in found[:2]]


def test_a_row_without_positions_waits_for_the_others(make_model: ModelMaker) -> None:
    model = make_model("gpt2")
    prompts = [Prompt(ids) for ids in random_ids(63, 9, 9, 9, 9, 9, 9, 9)]
    found = go_on(model, prompts, max_new_tokens=12)
    assert [len(each.ids) for each in found] == [1] + [12] * 7
    assert [each.ids for each in found[1:]] == one_by_one(model, [row.ids for row in prompts[1:]])


def test_no_tokens_to_generate_are_refused(make_model: ModelMaker) -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0; give 1 or more"):
        go_on(make_model("gpt2"), [Prompt([5])], max_new_tokens=0)


def test_bfloat16_decodes_as_the_model_alone_does(make_model: ModelMaker) -> None:
    model = make_model("llama").bfloat16()
    found = go_on(model, [Prompt(ids) for ids in IDS])
    same = sum(a.ids[0] == b[0] for a, b in zip(found, one_by_one(model, IDS), strict=True))
    assert same >= len(IDS) - 1  # rounding may turn a close call
    assert found[0].memory.layers[0][0].dtype is torch.bfloat16


def test_packed_attention_gives_way_while_generating(make_model: ModelMaker) -> None:
    model = make_model("llama")
    expected = go_on(model, [Prompt(ids) for ids in IDS])
    model.set_attn_implementation("fedsafe_packed")
    with generating(model):
        found = go_on(model, [Prompt(ids) for ids in IDS])
    assert [each.ids for each in found] == [each.ids for each in expected]


# ---- rows of like length -------------------------------------------------------------------------


def test_rows_go_together_from_the_shortest_to_the_longest() -> None:
    lengths = [5, 1, 9, 1, 3]
    assert list(of_like_length(lengths, max_rows=9, max_padding=100)) == [[1, 3, 4, 0, 2]]
    assert list(of_like_length(lengths, max_rows=2, max_padding=100)) == [[1, 3], [4, 0], [2]]


def test_rows_of_other_lengths_are_apart() -> None:
    lengths = [5, 1, 9, 1, 3]
    assert list(of_like_length(lengths, max_rows=9, max_padding=0)) == [[1, 3], [4], [0], [2]]
    assert list(of_like_length(lengths, max_rows=9, max_padding=4)) == [[1, 3, 4], [0, 2]]


def test_a_row_beyond_the_budget_is_alone() -> None:
    groups = of_like_length([4, 50, 5, 4], max_rows=9, max_padding=100, max_tokens=12)
    assert list(groups) == [[0, 3], [2], [1]]


def test_no_rows_are_no_group() -> None:
    assert list(of_like_length([], max_rows=9, max_padding=0)) == []
