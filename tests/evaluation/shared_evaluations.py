"""A tiny run with a safety probe, then `fedsafe test` of it: in one process or on ranks.

    python -m torch.distributed.run --nproc_per_node=2 shared_evaluations.py FOLDER BASE

leaves `FOLDER/<strategy>/`: a run directory, and what each rank asked the judge in `asked-<rank>`.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from fedsafe.commands import training
from fedsafe.data import loaders
from fedsafe.evaluation.judge import Judge, Judgement
from fedsafe.types import Conversation

STRATEGIES = ("ddp", "clients", "fsdp")
CONFIGS = Path(__file__).resolve().parents[2] / "configs/strategy"
SIZES = {"prompts": 11, "few": 2, "xstest": 7, "hhh": 9, "mt_bench": 5}
"""Items of each benchmark; they are asked in batches of 4."""
BATCH = 4


class HashJudge(Judge):
    """Rates by a hash of what it is shown; notes in `$ASKED` whenever it is asked."""

    name = "hash"  # type: ignore[assignment]
    identity = "hash"  # type: ignore[assignment]

    def check(self) -> None:
        pass

    def answers(self, prompts: Sequence[Conversation]) -> Iterator[tuple[int, Judgement]]:
        for place, prompt in enumerate(prompts):
            text = prompt[-1]["content"]
            digest = blake2b(text.encode(), digest_size=4).hexdigest()
            with Path(os.environ["ASKED"]).open("a") as file:
                file.write(f"{digest}\n")
            yield place, Judgement(f"Rating: [[{1 + int(digest, 16) % 10}]]")


def write_inputs(folder: Path, base: Path) -> None:
    """Conversations, the rows of every benchmark, and a configuration."""
    say = ("red", "blue cat", "green dog", "sun", "the moon is red")
    rows: dict[str, list[dict[str, Any]]] = {
        "conversations": [
            {"prompt": f"{say[n % 5]} {n}", "response": say[n % 3], "client": f"c{n % 2}"}
            for n in range(30)
        ],
        "prompts": [{"prompt": f"{say[n % 5]} {n}"} for n in range(SIZES["prompts"])],
        "few": [{"prompt": f"{say[n % 5]} {n}"} for n in range(SIZES["few"])],
        "xstest": [
            {"prompt": f"{say[n % 5]}?", "type": f"t{n % 2}", "label": ("safe", "unsafe")[n % 2]}
            for n in range(SIZES["xstest"])
        ],
        "hhh": [
            {
                "category": ("harmless", "honest")[n % 2],
                "query": f"{say[n % 5]} {n}",
                "chosen": say[n % 4],
                "rejected": f"no {say[n % 4]}",
            }
            for n in range(SIZES["hhh"])
        ],
        "mt_bench": [
            {"question_id": 81 + n, "category": ("writing", "stem")[n % 2], "turns": [say[n], "so"]}
            for n in range(SIZES["mt_bench"])
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (folder / "run.yaml").write_text(yaml.safe_dump(_settings(folder, base)))


def _settings(folder: Path, base: Path) -> dict[str, Any]:
    def made(name: str, kind: str, **settings: Any) -> dict[str, Any]:
        given = {"path": str(folder / f"{name}.jsonl"), "name": name, **settings}
        return {"class_path": f"fedsafe.evaluation.{kind}", "init_args": given}

    short = {"max_new_tokens": 5, "batch_size": BATCH}
    guard = {"class_path": "word_guard.WordGuard", "init_args": {"word": "red"}}
    benchmarks = [
        made("prompts", "prompts.Prompts", **short, temperature=0.7, guard=guard),
        made("few", "prompts.Prompts", **short),
        made("xstest", "xstest.XSTest", **short),
        made("hhh", "hhh.HHH"),
        made("mt_bench", "mt_bench.MTBench", **short, judge="shared_evaluations.HashJudge"),
    ]
    probe = {"benchmarks": benchmarks[:3], "num_items": 6}
    return {
        "rounds": 1,
        "model": {"base": str(base), "rank": 2, "learning_rate": 0.001},
        "data": {
            "path": str(folder / "conversations.jsonl"),
            "partition": "Natural",
            "batch_size": 4,
            "validation_share": 0.3,
            "test_path": str(folder / "conversations.jsonl"),
            "benchmarks": benchmarks,
        },
        "federated": {"clients_per_round": 2, "local_steps": 2},
        "trainer": {
            "accelerator": "cpu",
            "callbacks": [
                {
                    "class_path": "fedsafe.evaluation.safety_probe.SafetyProbe",
                    "init_args": probe,
                }
            ],
        },
    }


def run_all(folder: Path, strategy: str | None, adapter: Path | None) -> None:
    """Train a round, then measure an adapter; None is the one that was trained."""
    loaders._EVALUATION_TOKENS = 40  # several packs, as many as the ranks do not divide
    source = ["--config", str(folder.parent / "run.yaml")]
    if strategy is not None:
        source += ["--config", str(CONFIGS / f"{strategy}.yaml")]
    os.environ["ASKED"] = str(folder) + f".asked-{os.environ.get('RANK', 'alone')}"
    training.run("fit", [*source, "--run_dir", str(folder)])
    tested = ["--adapter", str(adapter or folder / "adapter")]
    training.run("test", [*source, "--run_dir", str(folder), *tested])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for kind in STRATEGIES:
        os.environ["FEDSAFE_CACHE"] = str(target / f"cache-{kind}")
        run_all(target / kind, kind, target / "one" / "adapter")
    dist.barrier()
    dist.destroy_process_group()
