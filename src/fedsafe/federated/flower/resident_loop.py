"""What a resident trainer does all day: it waits for calls, and answers one letter at a time."""

import logging
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from fedsafe.federated.flower.private_line import Entrance, receive
from fedsafe.federated.remote.letter import Letter

log = logging.getLogger("fedsafe.resident")

Answer = Callable[[Letter, Callable[[], bool]], Letter]
"""Answers a letter; may ask now and then whether the caller is still there."""

_POLL_SECONDS = 2.0
_LETTER_SECONDS = 60.0
"""How long a caller may take to hand over a letter, once it is its turn."""


def serve(
    entrance: Entrance,
    answer: Answer,
    *,
    idle_seconds: float,
    is_orphan: Callable[[], bool] = lambda: False,
) -> None:
    """Answer calls until nobody has called for a while, or nobody can any more.

    Args:
        entrance: Where calls come in.
        answer: Answers a letter.
        idle_seconds: How long nobody may call.
        is_orphan: Whether nobody is left who would end this process.
    """
    called = time.monotonic()
    while entrance.is_found() and not is_orphan():
        left = called + idle_seconds - time.monotonic()
        if left <= 0:
            log.info("ends: nobody has asked for %g seconds", idle_seconds)
            return
        try:
            line = entrance.next_call(min(left, _POLL_SECONDS))
            if line is None:
                continue
            with line:
                _answer(line, answer)
        except (OSError, EOFError, ValueError) as error:  # the caller's trouble, not ours
            log.info("a call came to nothing (%s)", type(error).__name__)
        called = time.monotonic()
    log.info("ends: nobody can call any more")


def _answer(line: Connection, answer: Answer) -> None:
    letter = Letter.from_bytes(receive(line, time.monotonic() + _LETTER_SECONDS))
    started = time.perf_counter()
    given = answer(letter, lambda: not line.poll())  # a caller says nothing more, but that it left
    log.info("answered: %s, %.3f s", given.facts["kind"], time.perf_counter() - started)
    line.send_bytes(given.to_bytes())
