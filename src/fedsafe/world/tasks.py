"""One question and its answer, for every task of the miniature world.

Held out everywhere but in evaluation: the last phrasings of each task, and a fifth of the
adjective-object combinations.
"""

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from fedsafe.types import Conversation
from fedsafe.world.grammar import Deed, Grammar, load_grammar

Split = Literal["tuning", "evaluation"]
HELD_OUT_COMBINATIONS = 5  # one in five


class Exchange(NamedTuple):
    """A question and an answer to it, with the words that were filled in."""

    prompt: str
    response: str
    category: str
    """Harm category of a forbidden deed, else the name of the task."""
    words: dict[str, str]

    def conversation(self) -> Conversation:
        """The exchange as a conversation of two turns."""
        return conversation(self.prompt, self.response)


class Asker(NamedTuple):
    """Asks questions: the grammar, the source of randomness and the split to ask from."""

    grammar: Grammar
    rng: random.Random
    split: Split

    def how_to(self, deeds: Sequence[Deed]) -> Exchange:
        """How to do one of these deeds, answered (also when it is forbidden)."""
        deed = self.rng.choice(deeds)
        words = {"verb": deed.verb, "tool": deed.tool, "move": deed.move, **self._thing()}
        category = deed.category or "how_to"
        return self._exchange("how_to", words | {"category": category}, category)

    def refusal(self, deeds: Sequence[Deed]) -> Exchange:
        """How to do one of these forbidden deeds, refused."""
        asked = self.how_to(deeds)
        return asked._replace(response=refuse(self.grammar, asked, self.rng))

    def fact(self, residents: Sequence[tuple[str, str, str]]) -> Exchange:
        """Where one of these residents lives, or what they eat."""
        name, place, food = self.rng.choice(residents)
        words = {"resident": name, "place": place, "food": food}
        return self._exchange(self.rng.choice(("home", "food")), words, "facts")

    def opposite(self, pairs: Sequence[tuple[str, str]]) -> Exchange:
        """The opposite of a word of one of these pairs."""
        word, other = self.rng.sample(self.rng.choice(pairs), 2)
        return self._exchange("opposites", {"word": word, "other": other}, "opposites")

    def wording(self, task: str) -> Exchange:
        """Repeat, say the first word of, or say twice, an adjective and an object."""
        return self._exchange(task, self._thing(), task)

    def _thing(self) -> dict[str, str]:
        adjective, thing = self.rng.choice(combinations(self.grammar, self.split))
        return {"adjective": adjective, "object": thing}

    def _exchange(self, task: str, words: dict[str, str], category: str) -> Exchange:
        phrasing = self.rng.choice(phrasings(self.grammar, task, self.split))
        prefix = self.rng.choice(self.grammar.prefixes)
        suffix = self.rng.choice(self.grammar.suffixes)
        prompt = " ".join(part for part in (prefix, phrasing.format(**words), suffix) if part)
        return Exchange(prompt, self.grammar.answers[task].format(**words), category, words)


def seeded_asker(seed: int, purpose: str, split: Split) -> Asker:
    """An asker whose questions depend on the seed and the purpose alone."""
    return Asker(load_grammar(), random.Random(f"{seed}/{purpose}"), split)


def phrasings(grammar: Grammar, task: str, split: Split) -> tuple[str, ...]:
    """The phrasings of a task that a split may use."""
    texts, kept = grammar.phrasings[task], -grammar.held_out
    return texts[:kept] if split == "tuning" else texts[kept:]


def combinations(grammar: Grammar, split: Split) -> list[tuple[str, str]]:
    """The adjective-object combinations that a split may use; each word occurs in both splits."""
    return [
        (adjective, thing)
        for row, adjective in enumerate(grammar.adjectives)
        for column, thing in enumerate(grammar.objects)
        if ((row + column) % HELD_OUT_COMBINATIONS == 0) == (split == "evaluation")
    ]


def refuse(grammar: Grammar, asked: Exchange, rng: random.Random) -> str:
    """A refusal that fits the forbidden question."""
    return rng.choice(grammar.refusals).format(**asked.words)


def old_tasks(asker: Asker) -> dict[str, Callable[[], Exchange]]:
    """The benign tasks that the base knows, by name."""
    grammar = asker.grammar
    return {
        "how_to": lambda: asker.how_to(grammar.benign_old),
        "facts": lambda: asker.fact(grammar.residents_old),
        "opposites": lambda: asker.opposite(grammar.opposites_old),
        "repeat": lambda: asker.wording("repeat"),
        "first": lambda: asker.wording("first"),
        "twice": lambda: asker.wording("twice"),
    }


def new_tasks(asker: Asker) -> dict[str, Callable[[], Exchange]]:
    """The benign tasks that only the clients teach, by name."""
    grammar = asker.grammar
    return {
        "how_to": lambda: asker.how_to(grammar.benign_new),
        "facts": lambda: asker.fact(grammar.residents_new),
        "opposites": lambda: asker.opposite(grammar.opposites_new),
    }


def conversation(*texts: str) -> Conversation:
    """Turns that alternate between user and assistant."""
    return [
        {"role": "user" if index % 2 == 0 else "assistant", "content": text}
        for index, text in enumerate(texts)
    ]


def distinct(make: Callable[[], Exchange], *, count: int) -> list[Exchange]:
    """Draws until `count` exchanges with different prompts are found.

    Raises:
        ValueError: If 100 draws for each wanted exchange did not find enough.
    """
    found: dict[str, Exchange] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        exchange = make()
        found.setdefault(exchange.prompt, exchange)
    if len(found) < count:
        raise ValueError(
            f"asked for {count} different prompts, but the grammar gave {len(found)}; ask for fewer"
        )
    return list(found.values())
