"""What a guard is shown of a sample."""

import pytest

from fedsafe.safety.guard import shown
from fedsafe.types import Conversation, JudgedPart, Turn


def turns(roles: str) -> Conversation:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [Turn(role=names[role], content=f"{n}{role}") for n, role in enumerate(roles)]  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("part", "roles", "expected"),
    [
        ("pair", "sua", ["0s", "1u", "2a"]),
        ("prompt", "suaua", ["0s", "1u", "2a", "3u"]),
        ("prompt", "usa", ["0u"]),  # a turn of the system before the answer
        ("prompt", "uaa", ["0u"]),
        ("response", "sua", ["2a"]),
    ],
)
def test_a_guard_is_shown_a_part_that_ends_with_whom_it_judges(
    part: JudgedPart, roles: str, expected: list[str]
) -> None:
    seen = shown(turns(roles), part)
    assert [turn["content"] for turn in seen] == expected
    assert seen[-1]["role"] == ("assistant" if part == "pair" else "user")
