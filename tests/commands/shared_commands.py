"""Commands that judge and revise, one after another: in one process or on ranks.

    python -m torch.distributed.run --nproc_per_node=2 shared_commands.py FOLDER BASE

leaves their outputs in FOLDER, and what each rank was told in `rank-<number>.json`.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from fedsafe.safety import filter_file, score_cache
from fedsafe.safety.guard import Guard, UnjudgeableError
from fedsafe.types import Conversation, Verdict

CHUNK = 6
"""Conversations that are judged together here."""
CONSTITUTION = {
    "name": "small",
    "principles": [
        {"name": "care", "critique_request": "harm?", "revision_request": "undo harm"},
        {"name": "honesty", "critique_request": "lies?", "revision_request": "undo lies"},
    ],
}


class MoodyGuard(Guard):
    """Its probabilities depend on what is judged together; cannot judge what holds `long`."""

    name = "moody"  # type: ignore[assignment]
    identity = "moody"  # type: ignore[assignment]

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        texts = [" ".join(turn["content"] for turn in each) for each in conversations]
        if reasons := {place: "too long" for place, text in enumerate(texts) if "long" in text}:
            raise UnjudgeableError(reasons)
        mood = sum(map(len, texts)) * 1e-5
        return [self._verdict(text, mood) for text in texts]

    def _verdict(self, text: str, mood: float) -> Verdict:
        is_red = "red" in text
        return Verdict(0.8 + mood if is_red else mood, ("S1",) if is_red else (), "moody")


def write_inputs(folder: Path) -> None:
    """Conversations, some of them twice, unreadable or too long for the guard; and prompts."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"say {'red' if n % 3 == 0 else 'blue'} {n % 17}",
            "response": "long" if n % 11 == 10 else "x" * (n % 5 + 1),
            "label": "unsafe" if n % 4 == 0 else "safe",
        }
        for n in range(40)
    ]
    rows[7] = {"prompt": "no answer"}
    _write(folder / "rows.jsonl", rows)
    _write(
        folder / "labelled.jsonl", [row for row in rows if row.get("response", "long") != "long"]
    )
    _write(folder / "red.jsonl", [{"prompt": f"how to {'x' * (n % 6)} {n}"} for n in range(11)])
    (folder / "small.yaml").write_text(yaml.safe_dump(CONSTITUTION))


def run_all(folder: Path, base: Path) -> list[tuple[bool, str, str]]:
    """Run every command; returns whether it failed, its output and what was wrong, of each."""
    guard = "--guard=shared_commands.MoodyGuard"
    rows = f"--input={folder / 'rows.jsonl'}"
    revise = [
        f"--input={folder / 'red.jsonl'}",
        f"--base={base}",
        f"--reviser.constitution={folder / 'small.yaml'}",
        "--reviser.guard=shared_commands.MoodyGuard",
        "--reviser.max_new_tokens=12",
        "--reviser.critic_temperature=1.0",
        "--reviser.batch_size=2",
    ]
    refuse = ["--policy=refuse", f"--output={folder / 'refused.jsonl'}"]
    commands = [
        ["filter", guard, rows, f"--output={folder / 'kept.jsonl'}"],
        ["filter", guard, rows, f"--output={folder / 'kept.jsonl'}"],
        ["filter", guard, rows, "--on_bad_row=error", f"--output={folder / 'none.jsonl'}"],
        ["filter", guard, rows, *refuse],
        ["measure", guard, f"--input={folder / 'labelled.jsonl'}", f"--output={folder / 'm'}"],
        ["revise", *revise, f"--output={folder / 'pairs.jsonl'}"],
        ["revise", *revise, f"--output={folder / 'pairs.jsonl'}"],
    ]
    with _small_chunks():
        return [_told(each) for each in commands]


def _told(arguments: list[str]) -> tuple[bool, str, str]:
    """As the command line does it, but that the ranks stay together."""
    name, out, wrong = arguments[0], StringIO(), ""
    with redirect_stdout(out):
        try:
            import_module(f"fedsafe.commands.{name}").run(name, arguments[1:])
        except (ValueError, OSError) as error:
            wrong = str(error)
    return bool(wrong), out.getvalue(), wrong


@contextmanager
def _small_chunks() -> Iterator[None]:
    before = score_cache.CHUNK_SIZE
    score_cache.CHUNK_SIZE = filter_file.CHUNK_SIZE = CHUNK
    try:
        yield
    finally:
        score_cache.CHUNK_SIZE = filter_file.CHUNK_SIZE = before


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    os.environ["FEDSAFE_CACHE"] = str(target / "cache")
    dist.init_process_group("gloo")  # a process can find the others only once
    said = run_all(target, Path(sys.argv[2]))
    (target / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()
