"""Guards that tests name on the command line: they look for a word, and can be interrupted."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from fedsafe.safety.guard import Guard
from fedsafe.types import Conversation, Verdict


class WordGuard(Guard):
    """Calls a conversation unsafe that holds a word; no word, no doubt.

    Where ``$JUDGED`` names a file, a line of `.` is added to it for each conversation judged; once
    it would have more than ``$KILL_AFTER`` bytes, the process kills itself instead.
    """

    def __init__(self, word: str = "dragon", unsafe: float = 0.9, safe: float = 0.1) -> None:
        self.word, self.unsafe, self.safe = word, unsafe, safe

    @property
    def name(self) -> str:
        return f"word-{self.word}"

    @property
    def identity(self) -> str:
        return f"{self.word} {self.unsafe} {self.safe}"

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        self._note(len(conversations))
        return [self._verdict(conversation) for conversation in conversations]

    def _verdict(self, conversation: Conversation) -> Verdict:
        text = " ".join(turn["content"] for turn in conversation)
        found = self.word in text.split()
        unsafe = self.unsafe if found else self.safe
        return Verdict(unsafe, ("S1",) if found else (), self.name, shortened="long" in text)

    def _note(self, num: int) -> None:
        if "JUDGED" in os.environ:
            file = Path(os.environ["JUDGED"])
            before = file.stat().st_size if file.exists() else 0
            if before + num > int(os.environ.get("KILL_AFTER", 10**9)):
                os.kill(os.getpid(), signal.SIGKILL)
            file.write_text("." * (before + num))


class NumberGuard(Guard):
    """Takes the last word of a conversation as the probability."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    @property
    def name(self) -> str:
        return f"number-{self.power:g}"

    @property
    def identity(self) -> str:
        return self.name

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        return [
            Verdict(float(each[-1]["content"].split()[-1]) ** self.power, (), self.name)
            for each in conversations
        ]
