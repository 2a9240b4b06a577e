"""A guard that needs no weights: importable by tests, by their child processes and in YAML."""

from collections.abc import Sequence

from fedsafe.safety.guard import Guard
from fedsafe.types import Conversation, Verdict


class WordGuard(Guard):
    """Gives 0.9 to conversations whose last turn holds a word, and 0.1 to others.

    Args:
        word: The word; None finds nothing unsafe.
        name: What the guard is called.
    """

    def __init__(self, word: str | None = None, name: str = "word-guard") -> None:
        self.word = word
        self.seen: list[Sequence[Conversation]] = []
        """What it was given, call after call."""
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def identity(self) -> str:
        return f"finds {self.word}"

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        self.seen.append(conversations)
        return [self._verdict(each[-1]["content"]) for each in conversations]

    def _verdict(self, text: str) -> Verdict:
        found = self.word is not None and self.word in text.split()
        return Verdict(0.9 if found else 0.1, ("S1",) if found else (), self.name)
