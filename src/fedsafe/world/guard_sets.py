"""Labelled conversations of the miniature world: what guards are trained on and measured with."""

from collections.abc import Callable, Sequence
from string import Formatter
from typing import TypedDict

from fedsafe.types import Conversation, Label
from fedsafe.world.generator import ClientRow
from fedsafe.world.grammar import Deed, Grammar, load_grammar
from fedsafe.world.tasks import Asker, Exchange, distinct, new_tasks, old_tasks, seeded_asker

HARM_SHARE = 1 / 3
REFUSAL_SHARE = 1 / 4
NEW_SHARE = 1 / 8
"""The tasks that only the clients teach; the rest are tasks of the base."""
NUM_CLIENTS = 8
"""Who hold the training rows, where a guard is trained across clients."""

_ANY_HARM = "a forbidden deed"


class LabelledRow(TypedDict):
    """A conversation and whether it is safe."""

    messages: Conversation
    label: Label
    category: str


def taught_categories(grammar: Grammar) -> tuple[str, ...]:
    """The harm categories that guards are trained on: every other one."""
    return grammar.categories[::2]


def guard_rows(*, num_rows: int, seed: int = 0) -> list[ClientRow]:
    """What a guard is trained on: a third harmful answers, of half of the harm categories.

    The others are safe: forbidden questions of all categories, refused, and benign ones, answered.
    What an answer to the other half looks like is for the guard to guess.
    """
    asker = seeded_asker(seed, "guard", "tuning")
    taught = taught_categories(asker.grammar)
    harm = [deed for deed in asker.grammar.forbidden if deed.category in taught]
    return [
        ClientRow(client=f"client-{index % NUM_CLIENTS}", **row)
        for index, row in enumerate(_labelled(asker, harm, num_rows=num_rows))
    ]


def guard_test_rows(*, num_rows: int, seed: int = 0) -> list[LabelledRow]:
    """What a guard is measured with: every harm category, asked about in held-out words."""
    asker = seeded_asker(seed, "guard", "evaluation")
    return _labelled(asker, asker.grammar.forbidden, num_rows=num_rows)


def plain_refusals() -> list[str]:
    """Refusals that fit every forbidden question, for a filter that repairs samples."""
    return [
        text.format(category=_ANY_HARM)
        for text in load_grammar().refusals
        if {name for _, name, _, _ in Formatter().parse(text) if name} <= {"category"}
    ]


def _labelled(asker: Asker, harm: Sequence[Deed], *, num_rows: int) -> list[LabelledRow]:
    """Different conversations in random order, of which the harmful ones do deeds of `harm`."""
    harmful = round(HARM_SHARE * num_rows)
    refused, new = round(REFUSAL_SHARE * num_rows), round(NEW_SHARE * num_rows)
    old_kinds, new_kinds = (list(tasks(asker).values()) for tasks in (old_tasks, new_tasks))
    parts: list[tuple[Callable[[], Exchange], int]] = [
        (lambda: asker.how_to(harm), harmful),
        (lambda: asker.refusal(asker.grammar.forbidden), refused),
        (lambda: asker.rng.choice(new_kinds)(), new),
        (lambda: asker.rng.choice(old_kinds)(), num_rows - harmful - refused - new),
    ]
    exchanges = [one for make, count in parts for one in distinct(make, count=count)]
    rows = [
        LabelledRow(
            messages=one.conversation(),
            label="unsafe" if index < harmful else "safe",
            category=one.category,
        )
        for index, one in enumerate(exchanges)
    ]
    asker.rng.shuffle(rows)
    return rows
