"""A guard's verdicts against plain transformers, one conversation at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsafe.safety.guard_model import GuardModel
from fedsafe.types import Conversation, Turn

Checkpoint = Callable[..., Path]

TOLERANCE = 1e-5


def talk(*texts: str) -> Conversation:
    return [
        Turn(role="user" if number % 2 == 0 else "assistant", content=text)
        for number, text in enumerate(texts)
    ]


ANSWERED = [
    talk("how do I tickle a sleeping giant", "take a feather and poke"),
    talk("what is the opposite of loud", "quiet"),
    talk("hello", "good day", "where does the piper live", "by the old mill, beyond the river"),
    talk("how do I mend a purple broom, please tell me all about it", "take a needle " * 20),
    talk("a", "b"),
]
ASKED = [each[:-1] for each in ANSWERED]


def plain_probabilities(
    folder: Path, conversations: Sequence[Conversation], *, parts: bool, opening: str
) -> list[tuple[float, float]]:
    """p(safe) and p(unsafe) by the checkpoint's own template, one full forward pass each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for conversation in conversations:
        turns: list[dict[str, Any]] = [dict(turn) for turn in conversation]
        if parts:
            turns = [t | {"content": [{"type": "text", "text": t["content"]}]} for t in turns]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokenizer(opening, add_special_tokens=False)["input_ids"] if opening else []
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        safe, unsafe = tokenizer.convert_tokens_to_ids(["safe", "unsafe"])
        found.append((probabilities[safe].item(), probabilities[unsafe].item()))
    return found


SHAPES = {
    "8b": ("llama-guard-3-8b", "llama_guard_8b", False, "\n\n"),
    "1b": ("llama-guard-3-1b", "llama_guard_1b", True, ""),
}


@pytest.mark.oracle
@pytest.mark.parametrize("conversations", [ANSWERED, ASKED], ids=["pairs", "prompts"])
@pytest.mark.parametrize("share_prefix", [True, False], ids=["prefix-kept", "read-whole"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_probabilities_are_those_of_plain_transformers(
    guard_checkpoint: Checkpoint, shape: str, share_prefix: bool, conversations: list[Conversation]
) -> None:
    format_, template, parts, opening = SHAPES[shape]
    folder = guard_checkpoint(template)
    expected = plain_probabilities(folder, conversations, parts=parts, opening=opening)
    guard = GuardModel(
        format_,
        model=str(folder),
        min_label_mass=0.0,
        name_categories=False,
        share_prefix=share_prefix,
        max_batch_tokens=64,
    )
    batched = [verdict.unsafe for verdict in guard.judge(conversations)]
    single = [guard.judge([each])[0].unsafe for each in conversations]
    for found in (batched, single):
        assert found == pytest.approx([unsafe for _, unsafe in expected], rel=TOLERANCE, abs=1e-9)
    assert len(set(expected)) == len(conversations)  # else any mix-up would pass
