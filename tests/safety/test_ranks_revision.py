"""A revision that several replicas share: the transcripts of one, batch for batch."""

from typing import Any

import pytest
from scripted_speaker import ScriptedSpeaker
from thread_peers import together
from word_guard import WordGuard

from fedsafe.peers import Peers
from fedsafe.safety.revision import RefusalRate, Reviser
from fedsafe.types import Conversation, RedTeamPrompt, Turn


def moody(scale: float, conversation: Conversation, seed: int) -> str:
    """What is said depends on everything that may decide it; some of it is a refusal."""
    if len(conversation) == 1 and seed % 5 == 0:
        return "i will not"
    return f"{scale:g} {seed % 1000} {len(conversation)}" + (" red" if seed % 7 == 0 else "")


def reviser(**settings: Any) -> Reviser:
    fixed: dict[str, Any] = {"batch_size": 3, "openings": ["i will not"]}
    return Reviser(**{**fixed, "critic_temperature": 1.0, **settings})


def prompts(num: int) -> list[RedTeamPrompt]:
    return [
        RedTeamPrompt(
            [Turn(role="user", content="x" * (n % 5 + 1))],
            "a red response" if n % 4 == 3 else None,
            "red.jsonl",
            n,
        )
        for n in range(num)
    ]


@pytest.mark.parametrize("num", [1, 3, 10, 20])
@pytest.mark.parametrize("size", [2, 3])
def test_replicas_say_what_one_says_in_the_same_batches(size: int, num: int) -> None:
    one = ScriptedSpeaker(moody)
    guarded = reviser(guard=WordGuard("red"))
    expected = list(guarded.revise_in_batches(one, prompts(num), seed=3, done={0, 1}))
    speakers = [ScriptedSpeaker(moody) for _ in range(size)]

    def work(peers: Peers) -> list[Any]:
        mine = reviser(guard=WordGuard("red"))
        speaker = speakers[peers.index]
        shared = mine.revise_in_batches(speaker, prompts(num), seed=3, done={0, 1}, replicas=peers)
        return list(shared)

    assert together(size, work) == [expected] * size
    calls = [call.conversations for speaker in speakers for call in speaker.calls]
    assert sorted(map(repr, calls)) == sorted(repr(call.conversations) for call in one.calls)


def test_the_ranks_of_a_replica_ask_the_guard_once() -> None:
    guards = [WordGuard("red"), WordGuard("red")]

    def work(peers: Peers) -> list[Any]:
        mine = reviser(guard=guards[peers.index])
        return list(mine.revise(ScriptedSpeaker(moody), prompts(10), seed=3, replica=peers))

    first, second = together(2, work)
    assert (
        first
        == second
        == list(reviser(guard=WordGuard("red")).revise(ScriptedSpeaker(moody), prompts(10), seed=3))
    )
    assert guards[0].seen
    assert not guards[1].seen


@pytest.mark.parametrize("num", [1, 10])
def test_replicas_find_the_refusal_rate_of_one(num: int) -> None:
    def work(peers: Peers) -> RefusalRate:
        speaker = ScriptedSpeaker(moody)
        return reviser().refusal_rate(speaker, prompts(num), seed=3, replicas=peers)

    assert together(2, work) == [work(Peers())] * 2
