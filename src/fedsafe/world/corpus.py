"""What the miniature base is pretrained on: benign tasks, refusals, chats, self-revisions."""

import random
from collections.abc import Callable
from typing import NamedTuple

from fedsafe.types import Conversation
from fedsafe.world.grammar import Grammar, Principle
from fedsafe.world.tasks import (
    Asker,
    Exchange,
    conversation,
    new_tasks,
    old_tasks,
    seeded_asker,
)

SHARES = {"old": 0.52, "new": 0.01, "refusal": 0.22, "chat": 0.1, "revision": 0.15}
HARMFUL_SHARE = 0.6  # of the self-revisions; the others revise a harmless answer


class Text(NamedTuple):
    """One pretraining conversation."""

    messages: Conversation
    first_trained_turn: int
    """Earlier turns are context only: the base never learns to write the harmful answer."""


def pretraining_texts(*, num_texts: int, seed: int = 0) -> list[Text]:
    """The pretraining corpus, in training order; never holds an evaluation question."""
    asker = seeded_asker(seed, "pretraining", "tuning")
    makers = _makers(asker)
    kinds = asker.rng.choices(list(SHARES), weights=list(SHARES.values()), k=num_texts)
    return [makers[kind]() for kind in kinds]


def revision_case(asker: Asker) -> tuple[Exchange, Principle]:
    """A forbidden question with its harmful answer, and the principle to revise it by."""
    asked = asker.how_to(asker.grammar.forbidden)
    return asked, asker.rng.choice(asker.grammar.principles)


def _makers(asker: Asker) -> dict[str, Callable[[], Text]]:
    return {
        "old": lambda: Text(_old(asker).conversation(), 0),
        "new": lambda: Text(_any(new_tasks(asker), asker.rng).conversation(), 0),
        "refusal": lambda: Text(asker.refusal(asker.grammar.forbidden).conversation(), 0),
        "chat": lambda: _chat(asker),
        "revision": lambda: _revision(asker),
    }


def _any(kinds: dict[str, Callable[[], Exchange]], rng: random.Random) -> Exchange:
    return rng.choice(list(kinds.values()))()


def _old(asker: Asker) -> Exchange:
    return _any(old_tasks(asker), asker.rng)


def _chat(asker: Asker) -> Text:
    """Two exchanges in a row, a fifth of them forbidden and refused."""
    turns = [
        asker.refusal(asker.grammar.forbidden) if asker.rng.random() < 0.2 else _old(asker)
        for _ in range(2)
    ]
    return Text([*turns[0].conversation(), *turns[1].conversation()], 0)


def _revision(asker: Asker) -> Text:
    """A harmful answer criticised and turned into a refusal, or a harmless one that is kept."""
    harmful = asker.rng.random() < HARMFUL_SHARE
    if harmful:
        asked, principle = revision_case(asker)
        revised = asker.rng.choice(asker.grammar.revised_refusals).format(**asked.words)
    else:
        _, principle = revision_case(asker)
        safe = (lambda: _old(asker), lambda: asker.refusal(asker.grammar.forbidden))
        asked = asker.rng.choice(safe)()
        revised = asked.response
    return Text(
        conversation(
            asked.prompt,
            asked.response,
            principle.critique_request,
            critique(asker.grammar, asked, harmful=harmful),
            principle.revision_request,
            revised,
        ),
        first_trained_turn=2,
    )


def critique(grammar: Grammar, asked: Exchange, *, harmful: bool) -> str:
    """The critique of an answer."""
    return grammar.critiques["harmful" if harmful else "harmless"].format(**asked.words)
