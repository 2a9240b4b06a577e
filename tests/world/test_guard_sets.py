from collections import Counter

import pytest
from transformers import PreTrainedTokenizerFast

from fedsafe.world.generator import ClientRow
from fedsafe.world.grammar import load_grammar
from fedsafe.world.guard_sets import (
    LabelledRow,
    guard_rows,
    guard_test_rows,
    plain_refusals,
    taught_categories,
)
from fedsafe.world.tasks import combinations, phrasings

Rows = list[LabelledRow] | list[ClientRow]

TRAINING, TEST = guard_rows(num_rows=600), guard_test_rows(num_rows=600)
SETS = [pytest.param(TRAINING, id="training"), pytest.param(TEST, id="test")]


def prompts(rows: Rows) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


def verbs_of_harmful_answers(rows: Rows) -> set[str]:
    """Forbidden verbs that an answer complies with, whatever the label says."""
    forbidden = {deed.verb for deed in load_grammar().forbidden}
    answered = [row for row in rows if row["messages"][1]["content"].startswith("take a")]
    return forbidden & {word for prompt in prompts(answered) for word in prompt.split()}


def test_same_seed_gives_the_same_rows_and_another_seed_other_ones() -> None:
    assert guard_rows(num_rows=600) == TRAINING != guard_rows(num_rows=600, seed=1)
    assert guard_test_rows(num_rows=600) == TEST != guard_test_rows(num_rows=600, seed=1)


@pytest.mark.parametrize("rows", SETS)
def test_a_third_is_harmful_and_what_complies_with_a_forbidden_question_is_labelled_so(
    rows: Rows,
) -> None:
    assert Counter(row["label"] for row in rows) == {"unsafe": 200, "safe": 400}
    grammar = load_grammar()
    for row in rows:
        answer, is_forbidden = row["messages"][1]["content"], row["category"] in grammar.categories
        complies = is_forbidden and answer.startswith("take a")
        assert (row["label"] == "unsafe") == complies
        assert answer.startswith(grammar.refusal_openings) == (is_forbidden and not complies)


@pytest.mark.parametrize("rows", SETS)
def test_refusals_of_every_category_and_benign_tasks_of_every_kind_are_safe(
    rows: Rows,
) -> None:
    safe = {row["category"] for row in rows if row["label"] == "safe"}
    tasks = {"how_to", "facts", "opposites", "repeat", "first", "twice"}
    assert safe == {*load_grammar().categories, *tasks}


def test_training_rows_are_held_by_clients_in_equal_parts() -> None:
    clients = Counter(row["client"] for row in TRAINING)
    assert clients == {f"client-{number}": 75 for number in range(8)}


def test_training_shows_the_harm_of_half_of_the_categories_and_the_test_all_of_it() -> None:
    grammar = load_grammar()
    taught = taught_categories(grammar)
    assert len(taught) * 2 == len(grammar.categories)
    wanted = {deed.verb for deed in grammar.forbidden if deed.category in taught}
    assert verbs_of_harmful_answers(TRAINING) == wanted
    assert verbs_of_harmful_answers(TEST) == {deed.verb for deed in grammar.forbidden}


def test_the_test_asks_in_words_and_about_things_that_training_never_uses() -> None:
    assert not set(prompts(TRAINING)) & set(prompts(TEST))
    grammar = load_grammar()
    held_out = [" ".join(each) for each in combinations(grammar, "evaluation")]
    assert not any(thing in prompt for prompt in prompts(TRAINING) for thing in held_out)
    starts = [text.partition(" {")[0] for text in phrasings(grammar, "how_to", "evaluation")]
    harmful = [row for row in TEST if row["label"] == "unsafe"]
    assert all(any(start in prompt for start in starts) for prompt in prompts(harmful))


@pytest.mark.parametrize("rows", SETS)
def test_no_conversation_comes_twice(rows: Rows) -> None:
    assert max(Counter(str(row["messages"]) for row in rows).values()) == 1


def test_refusals_for_the_filter_are_words_of_the_base(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    refusals = plain_refusals()
    assert len(set(refusals)) == len(refusals) >= 3
    for text in refusals:
        assert text.startswith(load_grammar().refusal_openings)
        assert "{" not in text
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
