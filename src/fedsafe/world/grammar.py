"""The miniature world's grammar: loads the YAML files in `grammar/` and checks them."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import yaml

GRAMMAR_DIR = Path(__file__).parent / "grammar"
FILES = ("deeds", "knowledge", "questions", "answers", "constitution")
TEXT_LISTS = (
    "adjectives",
    "objects",
    "prefixes",
    "suffixes",
    "refusals",
    "revised_refusals",
    "refusal_openings",
)
DEEDS_PER_CATEGORY = 4


class Deed(NamedTuple):
    """Something that can be done to a thing, and how."""

    verb: str
    tool: str
    move: str
    category: str | None
    """Harm category; None for a benign deed."""


class Resident(NamedTuple):
    """Somebody of the world and the two facts about them."""

    resident: str
    place: str
    food: str


class Principle(NamedTuple):
    """One principle of the constitution."""

    name: str
    critique_request: str
    revision_request: str


@dataclass(frozen=True)
class Grammar:
    """Everything that can be said in the world; `old` is known to the base, `new` is not."""

    adjectives: tuple[str, ...]
    objects: tuple[str, ...]
    benign_old: tuple[Deed, ...]
    benign_new: tuple[Deed, ...]
    forbidden: tuple[Deed, ...]
    residents_old: tuple[Resident, ...]
    residents_new: tuple[Resident, ...]
    opposites_old: tuple[tuple[str, str], ...]
    opposites_new: tuple[tuple[str, str], ...]
    prefixes: tuple[str, ...]
    suffixes: tuple[str, ...]
    phrasings: Mapping[str, tuple[str, ...]]
    held_out: int
    answers: Mapping[str, str]
    refusals: tuple[str, ...]
    revised_refusals: tuple[str, ...]
    refusal_openings: tuple[str, ...]
    principles: tuple[Principle, ...]
    critiques: Mapping[str, str]
    digest: str
    """Hash of the files, to key caches by."""

    @property
    def categories(self) -> tuple[str, ...]:
        """The harm categories, in the order of the file."""
        return tuple(dict.fromkeys(deed.category for deed in self.forbidden if deed.category))

    @property
    def client_harm(self) -> tuple[Deed, ...]:
        """The forbidden deeds that clients' harm uses: three of each category's four."""
        return self._forbidden_ranks(0, 3)

    @property
    def red_team(self) -> tuple[Deed, ...]:
        """The forbidden deeds that red-teaming uses: two of each category's four."""
        return self._forbidden_ranks(0, 2)

    def _forbidden_ranks(self, start: int, stop: int) -> tuple[Deed, ...]:
        ranks = range(start, stop)
        return tuple(d for i, d in enumerate(self.forbidden) if i % DEEDS_PER_CATEGORY in ranks)

    def words(self) -> list[str]:
        """Every word that a text of the world can hold, sorted."""
        deeds = (*self.benign_old, *self.benign_new, *self.forbidden)
        texts: list[str] = [*self.adjectives, *self.objects, *self.prefixes, *self.suffixes]
        texts += [word for deed in deeds for word in deed if word]
        texts += [
            word for resident in (*self.residents_old, *self.residents_new) for word in resident
        ]
        texts += [word for pair in (*self.opposites_old, *self.opposites_new) for word in pair]
        texts += [text for texts in self.phrasings.values() for text in texts]
        texts += [
            *self.answers.values(),
            *self.refusals,
            *self.revised_refusals,
            *self.critiques.values(),
        ]
        texts += [text for principle in self.principles for text in principle]
        return sorted(_literal_words(texts))


@cache
def load_grammar() -> Grammar:
    """The grammar of the package, read and checked once."""
    return read_grammar(GRAMMAR_DIR)


def read_grammar(directory: Path) -> Grammar:
    """Reads the YAML files of a grammar and checks them.

    Args:
        directory: Folder of `deeds.yaml`, `knowledge.yaml`, `questions.yaml`, `answers.yaml` and
            `constitution.yaml`.

    Raises:
        ValueError: If a category does not have four deeds, a deed occurs twice, or a held-out
            phrasing has a word that no other phrasing uses.
    """
    texts = {name: (directory / f"{name}.yaml").read_text(encoding="utf-8") for name in FILES}
    raw: dict[str, Any] = {}
    for text in texts.values():
        raw |= yaml.safe_load(text)
    grammar = _grammar(raw, digest=hashlib.sha256("\0".join(texts.values()).encode()).hexdigest())
    _check_deeds(grammar)
    _check_phrasings(grammar)
    return grammar


def _grammar(raw: dict[str, Any], *, digest: str) -> Grammar:
    fields: dict[str, Any] = {name: tuple(raw[name]) for name in TEXT_LISTS}
    fields |= {name: _deeds(raw[name], None) for name in ("benign_old", "benign_new")}
    fields |= {name: _residents(raw[name]) for name in ("residents_old", "residents_new")}
    fields |= {name: _pairs(raw[name]) for name in ("opposites_old", "opposites_new")}
    fields |= {name: raw[name] for name in ("held_out", "answers", "critiques")}
    return Grammar(
        **fields,
        forbidden=tuple(d for name, deeds in raw["forbidden"].items() for d in _deeds(deeds, name)),
        phrasings={task: tuple(texts) for task, texts in raw["phrasings"].items()},
        principles=tuple(Principle(**principle) for principle in raw["principles"]),
        digest=digest,
    )


def _deeds(raw: dict[str, list[str]], category: str | None) -> tuple[Deed, ...]:
    return tuple(Deed(verb, tool, move, category) for verb, (tool, move) in raw.items())


def _residents(raw: dict[str, list[str]]) -> tuple[Resident, ...]:
    return tuple(Resident(name, place, food) for name, (place, food) in raw.items())


def _pairs(raw: list[list[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((one, other) for one, other in raw)


def _check_deeds(grammar: Grammar) -> None:
    for category in grammar.categories:
        count = sum(deed.category == category for deed in grammar.forbidden)
        if count != DEEDS_PER_CATEGORY:
            raise ValueError(
                f"harm category {category!r} has {count} deeds; give it {DEEDS_PER_CATEGORY}"
            )
    verbs = [d.verb for d in (*grammar.benign_old, *grammar.benign_new, *grammar.forbidden)]
    if twice := {verb for verb in verbs if verbs.count(verb) > 1}:
        raise ValueError(f"deeds {sorted(twice)} occur more than once; keep one of each")


def _check_phrasings(grammar: Grammar) -> None:
    tuning = [t for texts in grammar.phrasings.values() for t in texts[: -grammar.held_out]]
    known = _literal_words([*tuning, *grammar.prefixes, *grammar.suffixes])
    for task, texts in grammar.phrasings.items():
        for text in texts[-grammar.held_out :]:
            if unknown := _literal_words([text]) - known:
                raise ValueError(
                    f"held-out phrasing {text!r} of {task} uses {sorted(unknown)}, which no tuning "
                    "phrasing teaches; use these words in one of the first phrasings too"
                )


def _literal_words(texts: Iterable[str]) -> set[str]:
    literals = (part[0] for text in texts for part in Formatter().parse(text))
    return {word for literal in literals for word in re.findall(r"\S+", literal)}
