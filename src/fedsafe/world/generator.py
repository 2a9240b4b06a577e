"""Harmless stand-in data of the miniature world, from a seed: clients, red team, evaluation sets.

The "harm" is make-believe (how to enchant the sleeping goose). Everything is a pure function of its
arguments; randomness derives from (seed, purpose, client) alone.
"""

import random
from typing import TypedDict

from fedsafe.types import Conversation, Label
from fedsafe.world.evaluation_sets import EvaluationSets, PairRow, PromptRow, evaluation_sets
from fedsafe.world.tasks import distinct, new_tasks, old_tasks, seeded_asker

__all__ = [
    "AnsweredRow",
    "ClientRow",
    "EvaluationSets",
    "PromptRow",
    "benign_prompts",
    "client_rows",
    "evaluation_sets",
    "helpful_pairs",
    "red_team_prompts",
]

REFUSAL_SHARE = 0.2  # of a client's harmless samples
OLD_SHARE = 0.35  # of a client's benign samples


class ClientRow(TypedDict):
    """One sample of one client."""

    messages: Conversation
    client: str
    label: Label
    category: str


class AnsweredRow(TypedDict):
    """A benign question with its answer."""

    prompt: str
    response: str
    category: str


def client_rows(
    *,
    num_clients: int = 8,
    samples_per_client: int = 128,
    harm_share: float = 0.2,
    seed: int = 0,
) -> list[ClientRow]:
    """The clients' training samples, a mix of benign tasks, refusals and make-believe harm.

    Of all samples `harm_share` are forbidden questions with a compliant answer; of the rest a fifth
    are refusals, and of what then remains 35 % are tasks the base knows and 65 % tasks it does not.
    Each client lacks one of the three new tasks. A larger share only swaps harmless samples for
    harmful ones: the others stay the same.

    Args:
        num_clients: Number of clients, at least 1; they are called client-0, client-1 …
        samples_per_client: Number of samples of each client, at least 1.
        harm_share: Share of harmful samples, in [0, 1]; exact over all clients.
        seed: Seed.

    Raises:
        ValueError: If an argument is out of range.
    """
    if min(num_clients, samples_per_client) < 1:
        raise ValueError(
            f"num_clients is {num_clients} and samples_per_client {samples_per_client}; "
            "both must be at least 1"
        )
    if not 0 <= harm_share <= 1:
        raise ValueError(f"harm_share is {harm_share}; give a share between 0 and 1")
    rows: list[ClientRow] = []
    for client in range(num_clients):
        harm = _even_part(harm_share * samples_per_client, client)
        rows += _one_client(client, harm=harm, total=samples_per_client, seed=seed)
    return rows


def red_team_prompts(*, num_prompts: int, seed: int = 0) -> list[PromptRow]:
    """Different forbidden questions for red-teaming, about 12 of the 24 forbidden deeds."""
    asker = seeded_asker(seed, "red-team", "tuning")
    asked = distinct(lambda: asker.how_to(asker.grammar.red_team), count=num_prompts)
    return [PromptRow(prompt=one.prompt, category=one.category) for one in asked]


def benign_prompts(*, num_prompts: int, seed: int = 0) -> list[AnsweredRow]:
    """Different benign questions with their answers, of the tasks that the base knows."""
    asker = seeded_asker(seed, "benign", "tuning")
    tasks = list(old_tasks(asker).values())
    asked = distinct(lambda: asker.rng.choice(tasks)(), count=num_prompts)
    return [
        AnsweredRow(prompt=one.prompt, response=one.response, category=one.category)
        for one in asked
    ]


def helpful_pairs(*, num_pairs: int, seed: int = 0) -> list[PairRow]:
    """Different benign questions of the tasks that the base knows: their answer, and another's."""
    asker = seeded_asker(seed, "helpful", "tuning")
    tasks = list(old_tasks(asker).values())
    asked = distinct(lambda: asker.rng.choice(tasks)(), count=num_pairs)
    answers = [one.response for one in asked]
    return [
        PairRow(
            prompt=one.prompt,
            chosen=one.response,
            rejected=asker.rng.choice([text for text in answers if text != one.response]),
            category=one.category,
        )
        for one in asked
    ]


def _even_part(share: float, index: int) -> int:
    """Rounds `share` for the index-th of equal parts so that the sum over the parts stays exact."""
    return round(share * (index + 1)) - round(share * index)


def _one_client(client: int, *, harm: int, total: int, seed: int) -> list[ClientRow]:
    refusals = round(REFUSAL_SHARE * (total - harm))
    old = round(OLD_SHARE * (total - harm - refusals))
    harmful, refused, known, novel = (
        seeded_asker(seed, f"client-{client}/{kind}", "tuning")
        for kind in ("harm", "refusals", "old", "new")
    )
    deeds = harmful.grammar.client_harm
    old_kinds = list(old_tasks(known).values())
    new_kinds = list(new_tasks(novel).values())
    del new_kinds[client % len(new_kinds)]
    exchanges = [harmful.how_to(deeds) for _ in range(harm)]
    exchanges += [refused.refusal(deeds) for _ in range(refusals)]
    exchanges += [known.rng.choice(old_kinds)() for _ in range(old)]
    exchanges += [novel.rng.choice(new_kinds)() for _ in range(total - harm - refusals - old)]
    rows = [
        ClientRow(
            messages=one.conversation(),
            client=f"client-{client}",
            label="unsafe" if index < harm else "safe",
            category=one.category,
        )
        for index, one in enumerate(exchanges)
    ]
    random.Random(f"{seed}/client-{client}/order").shuffle(rows)
    return rows
