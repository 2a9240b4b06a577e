"""Federations whose server trains too, run one after another: in one process or on ranks.

    python -m torch.distributed.run --nproc_per_node=2 visit_cases.py FOLDER BASE ROWS [zero]

leaves `FOLDER/<strategy>/<case>/`: a run directory, and `adapter.pt`, the last global adapter.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from federations import Federation, build_federation
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from word_guard import WordGuard

from fedsafe.data.augmentation import CaiAugmentation
from fedsafe.federated.checkpoint import RoundCheckpoint, last_checkpoint
from fedsafe.federated.constitutional_training import ConstitutionalTraining
from fedsafe.safety.filter import SafetyFilter
from fedsafe.safety.guard import UnjudgeableError
from fedsafe.safety.revision import Reviser
from fedsafe.strategies.client_parallel import ClientParallelStrategy
from fedsafe.strategies.sharded import ShardedStrategy
from fedsafe.types import Conversation, Verdict

Settings = dict[str, dict[str, Any]]

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": DDPStrategy,
    "fsdp": ShardedStrategy,
    "clients": lambda: ClientParallelStrategy(exchange="updates"),
}
ZERO = ("zero2", "zero3")
ZERO_CASES = ("sgd", "accumulated")
RESUMED = "resumed"
"""A run that is stopped inside a server visit, and goes on in a new Trainer."""
WORDS = ("red", "blue", "green", "cat", "dog", "sun", "moon")
CONSTITUTION = {
    "name": "short",
    "principles": [
        {"name": "one", "critique_request": "is it bad", "revision_request": "say it again"},
        {"name": "two", "critique_request": "what is bad", "revision_request": "do better"},
    ],
}


def write_files(folder: Path) -> None:
    """Pairs, helpful pairs and red-team prompts."""
    rows: dict[str, list[dict[str, str]]] = {
        "pairs": [
            {"prompt": f"{a} {b}", "chosen": f"no {a}", "rejected": f"take the {b} {a}"}
            for a in WORDS
            for b in WORDS[:2]
        ],
        "helpful": [{"prompt": f"say {a}", "chosen": a, "rejected": "no"} for a in WORDS],
        "prompts": [{"prompt": f"how to {a} the {b}"} for a in WORDS for b in WORDS[:4]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (folder / "constitution.yaml").write_text(yaml.safe_dump(CONSTITUTION))


def ready(folder: Path, *, data: Any = None, **training: Any) -> Settings:
    """A server that trains on ready pairs."""
    given = {
        "pairs": str(folder / "pairs.jsonl"),
        "helpful": str(folder / "helpful.jsonl"),
        "helpful_share": 0.25,
        "batch_size": 4,
    }
    rates = {"iterations": 5, "sft_learning_rate": 1e-3, "dpo_learning_rate": 1e-3}
    return {
        "data": {"cai": CaiAugmentation(**(given | (data or {})))},
        "rounds": {"cai": ConstitutionalTraining(**(rates | training))},
    }


def made(folder: Path, *, data: Any = None, **training: Any) -> Settings:
    """A server that makes its pairs; in batches of 5, so that the last one is smaller."""
    reviser = Reviser(
        str(folder / "constitution.yaml"),
        max_new_tokens=32,
        critic_temperature=1.0,
        batch_size=5,
        guard=WordGuard("z"),
    )
    given = {"prompts": str(folder / "prompts.jsonl"), "pairs": None, "reviser": reviser}
    return ready(folder, data=given | (data or {}), **training)


def _resumable(folder: Path) -> Settings:
    """Of the server's steps, five are of SFT: the eighth, which `SavesOnce` saves, is of DPO."""
    return made(folder, data={"batch_size": 2}, iterations=11, max_passes=50)


class PickyGuard(WordGuard):
    """Cannot judge what holds a moon."""

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        texts = [each[-1]["content"] for each in conversations]
        if reasons := {place: "a moon" for place, text in enumerate(texts) if "moon" in text}:
            raise UnjudgeableError(reasons)
        return super().judge(conversations)


def filtered(folder: Path) -> Settings:
    """Clients that refuse what their guard calls unsafe, and samples that are held out."""
    rule = SafetyFilter(PickyGuard("red"), policy="refuse")
    return {"data": {"filter": rule, "validation_share": 0.3, "on_bad_row": "skip"}}


CASES: dict[str, Callable[[Path], Settings]] = {
    "ready": lambda folder: ready(folder, nll_weight=0.5),
    "odd_steps": lambda folder: ready(folder, data={"batch_size": 5}),
    "one_pair_steps": lambda folder: ready(folder, data={"batch_size": 1, "helpful": None}),
    "accumulated": lambda folder: {
        **ready(folder, data={"batch_size": 3}),
        "trainer": {"accumulate_grad_batches": 2},
    },
    "made": made,
    "made_once": lambda folder: made(folder, data={"renew": False, "keep_refusals": True}),
    "sgd": lambda folder: {
        **ready(folder, sft_learning_rate=0.2, dpo_learning_rate=0.2, nll_weight=1.0),
        "model": {"optimizer": "sgd", "learning_rate": 0.01},
    },
    "clipped": lambda folder: {**ready(folder), "trainer": {"gradient_clip_val": 0.01}},
    "adaptive": lambda folder: made(folder, regime="adaptive", num_probe=7, probe_every=3),
    "filtered": filtered,
}
"""Settings by name; each call makes new objects, which remember nothing of another run."""


def run_cases(
    folder: Path,
    *,
    base: Path,
    path: Path,
    strategy: Callable[[], Any] | None,
    resumes: bool = True,
    cases: Sequence[str] = tuple(CASES),
) -> None:
    """Run every case.

    Args:
        folder: Where the runs go; the files for the server are in its parent.
        base: Folder of the base model.
        path: JSONL file of the clients' conversations.
        strategy: Makes the strategy; None is one process.
        resumes: Whether checkpoints inside a round can be had.
        cases: Which cases; all, unless told otherwise.
    """
    for name in cases:
        settings = CASES[name](folder.parent)
        finish(_federation(folder / name, settings, base, path, strategy).fit())
    if not resumes:
        return
    _start_and_stop(folder, base, path, strategy)
    settings = _resumable(folder.parent)
    run = _federation(folder / RESUMED, settings, base, path, strategy)
    finish(run.fit(ckpt_path=last_checkpoint(folder / RESUMED)))


def _federation(
    folder: Path, settings: Settings, base: Path, path: Path, strategy: Any, **more: Any
) -> Federation:
    # where a gradient is nearly zero, rounding decides the sign of AdamW's step: keep steps small
    settings = {**settings, "model": {"learning_rate": 1e-3, **settings.get("model", {})}}
    if strategy is not None:
        devices = {"strategy": strategy(), "devices": 2}
        settings["trainer"] = {**devices, **settings.get("trainer", {})}
    return build_federation(folder, base=base, path=path, **settings, **more)


class SavesOnce(RoundCheckpoint):
    """Keeps the first checkpoint, inside a server visit, as a run does that is killed after it."""

    _has_saved = False

    def _save(self, trainer: Trainer) -> None:
        if not self._has_saved:
            super()._save(trainer)
        self._has_saved = True


def _start_and_stop(folder: Path, base: Path, path: Path, strategy: Any) -> None:
    """Leave a checkpoint that was written inside the server's DPO, and nothing later."""
    save = SavesOnce(every_n_steps=8)  # a round has 6 steps of clients
    settings = _resumable(folder.parent)
    run = _federation(folder / RESUMED, settings, base, path, strategy, callbacks=(save,)).fit()
    if run.trainer.is_global_zero:
        (folder / RESUMED / "rounds.jsonl").unlink()
    run.trainer.strategy.barrier()


def finish(run: Federation) -> None:
    """Leave the adapter; every rank must have the same."""
    if run.trainer.is_global_zero:
        torch.save(run.adapter, run.folder / "adapter.pt")
    everyones = run.rounds._layout.world.gather(run.adapter)
    assert all(torch.equal(each, run.adapter) for each in everyones)


def break_off(folder: Path, *, base: Path, path: Path, strategy: Any) -> str:
    """Take a step that leaves no adapter; returns what the rank was told. Train no more then."""
    settings = ready(folder.parent)
    settings["rounds"]["cai"].learning_rate = lambda *_: float("inf")
    run = _federation(folder / "broken", settings, base, path, strategy)
    try:
        run.fit()
    except ValueError as error:
        return str(error)
    return "nothing"


def _run_zero(folder: Path, **given: Any) -> None:
    from cpu_zero import CPUZeroStrategy  # DeepSpeed takes seconds to import

    for kind in ZERO:
        strategy = partial(CPUZeroStrategy, stage=int(kind[-1]))
        run_cases(folder / kind, strategy=strategy, cases=ZERO_CASES, **given)


def _run_others(folder: Path, **given: Any) -> None:
    for kind, strategy in STRATEGIES.items():
        run_cases(folder / kind, strategy=strategy, resumes=kind != "clients", **given)
    told = break_off(folder / kind, strategy=strategy, **given)
    (folder / kind / f"broken-{os.environ['RANK']}.txt").write_text(told)


if __name__ == "__main__":
    run = _run_zero if sys.argv[4:] == ["zero"] else _run_others
    run(Path(sys.argv[1]), base=Path(sys.argv[2]), path=Path(sys.argv[3]))
