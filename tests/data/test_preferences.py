import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fedsafe.data import preferences as preferences_module
from fedsafe.data.packing import Pack, SupervisedBatch
from fedsafe.data.preferences import PreferenceStore
from fedsafe.data.sources import Rejected
from fedsafe.data.tokenizer import train_tokenizer
from fedsafe.peers import Peers
from fedsafe.types import Conversation, PreferencePair

StoreMaker = Callable[..., PreferenceStore]


@pytest.fixture(scope="module")
def shared_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Where do storks sleep? On chimneys."], vocab_size=280)


@pytest.fixture
def tokenizer(shared_tokenizer: PreTrainedTokenizerFast) -> Any:
    """Given back with the chat template that it had."""
    template = shared_tokenizer.chat_template
    yield shared_tokenizer
    shared_tokenizer.chat_template = template


@pytest.fixture
def make_store(tokenizer: PreTrainedTokenizerFast) -> StoreMaker:
    def make(pairs: Sequence[PreferencePair], *, max_length: int = 200) -> PreferenceStore:
        return PreferenceStore(pairs, tokenizer, max_length=max_length)

    return make


def pair(
    chosen: str, rejected: str | None, *, ask: str = "how?", row: int = 1, turns: int = 1
) -> PreferencePair:
    roles: Any = ("user", "assistant")
    prompt: Conversation = [{"role": roles[i % 2], "content": ask} for i in range(turns)]
    return PreferencePair(prompt, chosen, rejected, "pairs.jsonl", row)


PAIRS = [
    pair("not at all", "say the spell", row=1),
    pair("only good", None, row=2),
    pair("rather sing", "curse", ask="what now, my goose?", row=3, turns=3),
    pair("no", "yes, gladly, with every word of it", row=4),
]


def samples_of(packed: Pack, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Text of each segment, and of its tokens with a loss."""
    ids = packed.input_ids[0].split(packed.segment_lengths)
    targets = packed.targets.split(packed.target_counts)
    return [(tokenizer.decode(i), tokenizer.decode(t)) for i, t in zip(ids, targets, strict=True)]


def rows(indices: Sequence[int], num: int) -> Tensor:
    """A reference that has no number where none was asked for."""
    reference = torch.full((num, 2), float("nan"))
    for index in indices:
        reference[index] = torch.tensor([-index, -index - 0.5])
    return reference


def test_the_loss_is_on_the_chosen_answer_alone(
    make_store: StoreMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    [batch] = make_store(PAIRS).supervised([2, 0, 1])
    assert samples_of(batch, tokenizer) == [
        (
            "User: what now, my goose?\nAssistant: what now, my goose?<|end|>\n"
            "User: what now, my goose?\nAssistant: rather sing<|end|>",
            " rather sing<|end|>",
        ),
        ("User: how?\nAssistant: not at all<|end|>", " not at all<|end|>"),
        ("User: how?\nAssistant: only good<|end|>", " only good<|end|>"),
    ]
    assert batch.normalizer == len(batch.targets)


def test_chosen_and_rejected_alternate_beside_their_reference(
    make_store: StoreMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    store = make_store(PAIRS)
    [batch] = store.preference([3, 0], reference=rows([0, 3], 4), beta=0.2, nll_weight=0.5)
    answers = [answer for _, answer in samples_of(batch, tokenizer)]
    assert answers == [
        " no<|end|>",
        " yes, gladly, with every word of it<|end|>",
        " not at all<|end|>",
        " say the spell<|end|>",
    ]
    assert batch.reference.tolist() == [-3.0, -3.5, 0.0, -0.5]
    assert (batch.num_pairs, batch.beta, batch.nll_weight) == (2, 0.2, 0.5)
    assert batch.num_chosen_tokens == sum(batch.target_counts[::2])


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
def test_parts_are_even_none_is_empty_and_each_knows_the_whole_step(
    make_store: StoreMaker, num_parts: int
) -> None:
    store = make_store([pair("yes " * (i + 1), "no", row=i) for i in range(5)])
    indices = [4, 0, 3, 1, 2]
    supervised = store.supervised(indices, num_parts=num_parts)
    reference = rows(indices, 5)
    compared = store.preference(
        indices, reference=reference, beta=0.1, nll_weight=0.0, num_parts=num_parts
    )
    expected = {1: [5], 2: [3, 2], 3: [2, 2, 1], 8: [1] * 5}[num_parts]
    assert [len(part.segment_lengths) for part in supervised] == expected
    assert [len(part.segment_lengths) for part in compared] == [2 * each for each in expected]
    tokens = sum(len(part.targets) for part in supervised)
    assert {part.normalizer for part in supervised} == {tokens}
    assert {(part.num_pairs, part.num_chosen_tokens) for part in compared} == {(5, tokens)}
    kept = torch.cat([part.reference for part in compared]).view(-1, 2)
    assert sorted(kept.tolist()) == sorted(reference.tolist())


@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_share_the_parts_of_a_step_and_have_as_many(
    make_store: StoreMaker, size: int, num_parts: int
) -> None:
    store = make_store([pair("yes " * (i + 1), "no", row=i) for i in range(5)])
    indices, reference = [4, 0, 3, 1, 2], rows(range(5), 5)
    settings: Any = {"reference": reference, "beta": 0.1, "nll_weight": 0.0}
    many = size * num_parts
    whole = (
        store.supervised(indices, num_parts=many),
        store.preference(indices, num_parts=many, **settings),
    )
    shares: list[Any] = [
        (
            store.supervised(indices, num_parts=num_parts, peers=peers),
            store.preference(indices, num_parts=num_parts, peers=peers, **settings),
        )
        for peers in (Peers(index, size) for index in range(size))
    ]
    for place, parts in enumerate(whole):
        assert len({len(share[place]) for share in shares}) == 1
        dealt = [batch for step in zip(*(s[place] for s in shares), strict=True) for batch in step]
        filled = [batch for batch in dealt if len(batch.targets)]
        assert [b.input_ids.tolist() for b in filled] == [b.input_ids.tolist() for b in parts]
        assert all(type(batch) is SupervisedBatch for batch in dealt[len(parts) :])
        assert len(dealt) - len(parts) < size


def test_a_step_without_pairs_has_no_packs(make_store: StoreMaker) -> None:
    store = make_store(PAIRS)
    assert store.supervised([], num_parts=2) == []
    assert store.preference([], reference=rows([], 4), beta=0.1, nll_weight=0.0) == []
    assert list(store.both_answers([])) == []
    assert store.num_tokens([], both=True) == 0


def test_a_store_of_nothing_is_empty(make_store: StoreMaker) -> None:
    store = make_store([])
    assert len(store) == len(store.usable) == len(store.comparable) == 0
    assert (store.longest, store.largest_id, store.left_out) == (0, -1, [])


def test_every_pair_is_in_one_pack_of_both_answers_within_the_budget(
    make_store: StoreMaker, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preferences_module, "_MAX_PACK_TOKENS", 100)
    lengths = [3, 60, 7, 1, 20, 2]
    store = make_store([pair("a" * n, "b" * n, row=i) for i, n in enumerate(lengths)])
    packs = list(store.both_answers([5, 1, 0, 3, 4]))
    assert sorted(i for indices, _ in packs for i in indices) == [0, 1, 3, 4, 5]
    assert len(packs) > 2
    for indices, packed in packs:
        assert len(indices) == 1 or sum(packed.segment_lengths) <= 100
        assert sum(packed.segment_lengths) == store.num_tokens(indices, both=True)
        answers = [answer for _, answer in samples_of(packed, tokenizer)]
        expected = [f" {c * lengths[i]}<|end|>" for i in indices for c in "ab"]
        assert answers == expected


def test_a_pair_without_a_worse_answer_is_not_given_for_comparison(make_store: StoreMaker) -> None:
    store = make_store(PAIRS)
    assert store.comparable.tolist() == [True, False, True, True]
    with pytest.raises(AssertionError, match="pair 1 is not comparable"):
        store.preference([0, 1], reference=rows([0, 1], 4), beta=0.1, nll_weight=0.0)


def test_answers_are_compared_as_they_are_after_the_cut(make_store: StoreMaker) -> None:
    pairs = [
        pair("the same", "the same"),
        pair("the beginning is one", "the beginning is another"),
        pair("", "answered"),
    ]
    assert make_store(pairs).comparable.tolist() == [False, True, True]
    cut = make_store(pairs, max_length=30)
    assert cut.comparable.tolist() == [False, False, True]
    assert cut.longest == 30


def test_a_pair_whose_answer_is_cut_off_is_left_out_and_named(make_store: StoreMaker) -> None:
    pairs = [*PAIRS[:2], pair("no", "yes", ask="long " * 100, row=7), PAIRS[3]]
    store = make_store(pairs, max_length=60)
    assert store.usable.tolist() == [0, 1, 3]
    assert len(store) == 3
    assert store.comparable.tolist() == [True, False, True]
    reason = "no answer token within max_length 60; raise max_length"
    assert store.left_out == [Rejected("pairs.jsonl", 7, reason)]


def test_a_prompt_that_the_template_refuses_is_left_out_with_its_reason(
    make_store: StoreMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'goose' in m.content %}{{ raise_exception('no birds') }}"
        "{% endif %}{{ m.content + eos_token }}{% endfor %}"
    )
    store = make_store([*PAIRS, pair("yes", "a goose", row=5)])
    assert store.usable.tolist() == [0, 1, 3, 4]
    (left_out,) = store.left_out
    assert left_out == Rejected(
        "pairs.jsonl", 3, "the chat template refuses this conversation: no birds"
    )
    # only the worse answer is refused: the better one serves to imitate
    assert store.comparable.tolist() == [True, False, True, False]


def test_an_answer_without_a_token_that_could_be_predicted_is_no_answer(
    make_store: StoreMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    store = make_store([pair("no", ""), pair("", "yes"), pair("a", "no", ask="")])
    assert store.usable.tolist() == [0]
    assert store.comparable.tolist() == [False]
    assert len(store.left_out) == 2  # the last one's answer is the first token: nothing predicts it


def test_answers_stay_with_their_pairs_across_the_batches_that_are_tokenised_together(
    make_store: StoreMaker, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [pair(f"good {i}", None if i % 3 == 0 else f"bad {i}", row=i) for i in range(20)]
    pairs.insert(10, pair("no", "yes", ask="long " * 100, row=99))
    monkeypatch.setattr(preferences_module, "_RENDERED_TOGETHER", 7)
    store = make_store(pairs)
    assert store.usable.tolist() == [i for i in range(21) if i != 10]
    assert [each.row for each in store.left_out] == [99]
    assert store.comparable.tolist() == [i % 3 != 0 for i in range(20)]
    [good] = store.supervised(range(20))
    expected = [f" good {i}<|end|>" for i in range(20)]
    assert [answer for _, answer in samples_of(good, tokenizer)] == expected
    indices = np.flatnonzero(store.comparable).tolist()
    [both] = store.preference(indices, reference=rows(indices, 20), beta=0.1, nll_weight=0.0)
    bad = [answer for _, answer in samples_of(both, tokenizer)][1::2]
    assert bad == [f" bad {i}<|end|>" for i in indices]


def test_two_stores_make_one_with_the_first_ones_pairs_before(
    make_store: StoreMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = make_store([PAIRS[0], pair("no", "yes", ask="long " * 100, row=7)])
    second = make_store(PAIRS[1:])
    both = first + second
    assert len(both) == 4
    assert both.usable.tolist() == [0, 2, 3, 4]
    assert both.comparable.tolist() == [True, False, True, True]
    assert both.left_out == first.left_out
    assert both.longest == second.longest
    assert both.largest_id == max(first.largest_id, second.largest_id)
    [batch] = both.supervised([3, 0])
    answers = [answer for _, answer in samples_of(batch, tokenizer)]
    assert answers == [" no<|end|>", " not at all<|end|>"]
    assert len(first) == 1  # neither has changed
    assert len(second) == 3


def test_tokens_are_counted_with_one_answer_or_both(make_store: StoreMaker) -> None:
    store = make_store(PAIRS)
    [chosen] = store.supervised([0, 3])
    [both] = store.preference([0, 3], reference=rows([0, 3], 4), beta=0.1, nll_weight=0.0)
    assert store.num_tokens([0, 3], both=False) == chosen.input_ids.shape[1]
    assert store.num_tokens([0, 3], both=True) == both.input_ids.shape[1]


def test_the_longest_sample_and_the_largest_id_are_over_both_answers(
    make_store: StoreMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    store = make_store(PAIRS[3:])
    [both] = store.preference([0], reference=rows([0], 1), beta=0.1, nll_weight=0.0)
    assert store.longest == both.segment_lengths[1] > both.segment_lengths[0]
    assert store.largest_id == both.input_ids.max()


def test_thousands_of_pairs_take_seconds(make_store: StoreMaker) -> None:
    pairs = [pair("rather not " * 10, "say the spell " * 10, row=i) for i in range(1000)]
    started = time.perf_counter()
    assert make_store(pairs).comparable.all()
    assert time.perf_counter() - started < 10  # it takes about half a second
