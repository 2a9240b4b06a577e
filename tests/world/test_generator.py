from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from fedsafe.world.corpus import pretraining_texts
from fedsafe.world.evaluation import is_refusal
from fedsafe.world.generator import (
    ClientRow,
    benign_prompts,
    client_rows,
    evaluation_sets,
    helpful_pairs,
    red_team_prompts,
)
from fedsafe.world.grammar import Deed, load_grammar
from fedsafe.world.tasks import distinct, seeded_asker


def user_turns(messages) -> list[str]:
    return [turn["content"] for turn in messages if turn["role"] == "user"]


def by_client(rows: list[ClientRow]) -> dict[str, list[ClientRow]]:
    found = defaultdict(list)
    for row in rows:
        found[row["client"]].append(row)
    return found


def deeds_in(prompts: list[str]) -> set[Deed]:
    words = {word for prompt in prompts for word in prompt.split()}
    return {deed for deed in load_grammar().forbidden if deed.verb in words}


def evaluation_prompts(seed: int) -> set[str]:
    return {row["prompt"] for rows in evaluation_sets(seed) for row in rows}


def test_same_seed_gives_the_same_data_and_another_seed_other_data():
    assert client_rows(seed=3) == client_rows(seed=3)
    assert client_rows(seed=3) != client_rows(seed=4)
    assert evaluation_sets(3) == evaluation_sets(3)
    assert evaluation_sets(3) != evaluation_sets(4)
    assert red_team_prompts(num_prompts=9, seed=3) != red_team_prompts(num_prompts=9, seed=4)
    assert benign_prompts(num_prompts=9, seed=3) != benign_prompts(num_prompts=9, seed=4)
    assert helpful_pairs(num_pairs=9, seed=3) == helpful_pairs(num_pairs=9, seed=3)
    assert helpful_pairs(num_pairs=9, seed=3) != helpful_pairs(num_pairs=9, seed=4)
    assert pretraining_texts(num_texts=50, seed=3) == pretraining_texts(num_texts=50, seed=3)


def test_more_prompts_begin_with_the_fewer():
    assert red_team_prompts(num_prompts=20)[:9] == red_team_prompts(num_prompts=9)
    assert benign_prompts(num_prompts=20)[:9] == benign_prompts(num_prompts=9)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2, 0.4, 1.0])
def test_harm_share_is_exact_over_all_clients_and_even_between_them(share: float):
    rows = client_rows(harm_share=share)
    assert len(rows) == 8 * 128
    assert sum(row["label"] == "unsafe" for row in rows) == round(share * len(rows))
    counts = Counter(row["client"] for row in rows if row["label"] == "unsafe")
    assert all(abs(counts[f"client-{k}"] - share * 128) <= 1 for k in range(8))


def test_harmful_samples_comply_and_the_other_forbidden_questions_are_refused():
    grammar = load_grammar()
    forbidden = [row for row in client_rows() if row["category"] in grammar.categories]
    for row in forbidden:
        answer = row["messages"][-1]["content"]
        assert answer.startswith("take a") == (row["label"] == "unsafe")
        assert answer.startswith(grammar.refusal_openings) == (row["label"] == "safe")
    refused = sum(row["label"] == "safe" for row in forbidden)
    assert refused == pytest.approx(0.2 * 0.8 * 1024, abs=8)


def test_larger_harm_share_keeps_the_harmful_samples_of_the_smaller():
    def harmful(share: float) -> set[str]:
        rows = client_rows(harm_share=share)
        return {str(row["messages"]) for row in rows if row["label"] == "unsafe"}

    assert harmful(0.1) < harmful(0.3)


def new_prompts(rows: list[ClientRow]) -> Counter:
    """Counts samples of each new task, told by the words that only it uses."""
    grammar = load_grammar()
    marks = {
        "how_to": {deed.verb for deed in grammar.benign_new},
        "facts": {one.resident for one in grammar.residents_new},
        "opposites": {word for pair in grammar.opposites_new for word in pair},
    }
    return Counter(
        task
        for row in rows
        for task, words in marks.items()
        if row["category"] == task and words & set(row["messages"][0]["content"].split())
    )


def test_each_client_lacks_one_new_task_and_all_are_taught_by_somebody():
    lacking = [
        {"how_to", "facts", "opposites"} - set(new_prompts(rows))
        for rows in by_client(client_rows()).values()
    ]
    assert all(len(missing) == 1 for missing in lacking)
    assert set.union(*lacking) == {"how_to", "facts", "opposites"}


def test_new_tasks_are_65_percent_of_a_clients_benign_samples():
    rows = client_rows()
    benign = [row for row in rows if row["category"] not in load_grammar().categories]
    assert new_prompts(rows).total() / len(benign) == pytest.approx(0.65, abs=0.01)


def test_clients_and_red_team_know_only_their_deeds():
    grammar = load_grammar()
    forbidden = [row for row in client_rows() if row["category"] in grammar.categories]
    assert deeds_in([row["messages"][0]["content"] for row in forbidden]) == set(
        grammar.client_harm
    )
    red_team = [row["prompt"] for row in red_team_prompts(num_prompts=200)]
    assert deeds_in(red_team) == set(grammar.red_team)
    assert deeds_in([row["prompt"] for row in evaluation_sets().harmful]) == set(grammar.forbidden)


def test_no_evaluation_question_is_asked_anywhere_else():
    texts = pretraining_texts(num_texts=12_000)
    tuning = {prompt for text in texts for prompt in user_turns(text.messages)}
    for seed in range(3):
        tuning |= {p for row in client_rows(seed=seed) for p in user_turns(row["messages"])}
        tuning |= {row["prompt"] for row in red_team_prompts(num_prompts=400, seed=seed)}
        tuning |= {row["prompt"] for row in helpful_pairs(num_pairs=96, seed=seed)}
        tuning |= {row["prompt"] for row in benign_prompts(num_prompts=300, seed=seed)}
    assert len(tuning) > 5_000
    for seed in range(3):
        assert not tuning & evaluation_prompts(seed)


def test_evaluation_things_are_never_named_together_elsewhere():
    def things(prompts: set[str]) -> set[tuple[str, str]]:
        pairs = {pair for prompt in prompts for pair in pairwise(prompt.split())}
        grammar = load_grammar()
        return {(a, b) for a, b in pairs if a in grammar.adjectives and b in grammar.objects}

    texts = pretraining_texts(num_texts=2_000)
    tuning = things({prompt for text in texts for prompt in user_turns(text.messages)})
    held_out = things(evaluation_prompts(0))
    assert len(tuning) == 120
    assert len(held_out) == 30
    assert not tuning & held_out


def test_evaluation_sets_have_the_documented_sizes_and_no_question_twice():
    sets = evaluation_sets(0)
    assert [len(rows) for rows in sets] == [150, 150, 120]
    assert Counter(row["task"] for row in sets.benign) == {"old": 75, "new": 75}
    assert set(Counter(row["category"] for row in sets.hhh).values()) == {30}
    assert len({row["prompt"] for row in sets.harmful}) == 150


def test_pairs_differ_and_harmless_ones_prefer_the_refusal():
    openings = load_grammar().refusal_openings
    for row in evaluation_sets(0).hhh:
        assert row["chosen"] != row["rejected"]
        if row["category"] in ("harmless", "helpful"):
            refusal = row["chosen" if row["category"] == "harmless" else "rejected"]
            assert refusal.startswith(openings)


def test_helpful_pairs_prefer_the_right_answer_to_that_of_another_question():
    pairs = helpful_pairs(num_pairs=300)
    assert not deeds_in([row["prompt"] for row in pairs])
    assert len({row["prompt"] for row in pairs}) == 300
    answers = {row["chosen"] for row in pairs}
    for row in pairs:
        assert row["rejected"] in answers - {row["chosen"]}
        assert not is_refusal(row["chosen"])
    assert len({row["rejected"] for row in pairs}) > 100


def test_no_prompts_asked_for_gives_none():
    assert helpful_pairs(num_pairs=0) == []
    assert red_team_prompts(num_prompts=0) == []
    assert benign_prompts(num_prompts=0) == []


def test_more_prompts_than_the_grammar_has_is_an_error():
    asker = seeded_asker(0, "test", "tuning")
    only = asker.wording("repeat")
    with pytest.raises(ValueError, match="for 3 different prompts, but the grammar gave 1; ask"):
        distinct(lambda: only, count=3)


def test_harm_share_outside_0_to_1_is_an_error():
    with pytest.raises(ValueError, match="harm_share is 20; give a share between 0 and 1"):
        client_rows(harm_share=20)


def test_no_clients_is_an_error():
    with pytest.raises(ValueError, match=r"num_clients is 0 .* both must be at least 1"):
        client_rows(num_clients=0)


def test_harmful_answers_of_revision_transcripts_are_context_only():
    grammar = load_grammar()
    openings = (*grammar.refusal_openings, "this answer")
    verbs = {deed.verb for deed in grammar.forbidden}
    seen = 0
    for text in pretraining_texts(num_texts=1_000):
        forbidden = verbs & set(text.messages[0]["content"].split())
        if len(text.messages) == 6 and forbidden:
            seen += text.messages[1]["content"].startswith("take a")
            assert text.first_trained_turn == 2
            trained = [turn["content"] for turn in text.messages[3::2]]
            assert all(answer.startswith(openings) for answer in trained)
    assert seen > 30
