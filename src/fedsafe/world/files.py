"""Writes the miniature world to a directory, as the files that a user would bring."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from fedsafe.world.generator import (
    benign_prompts,
    client_rows,
    evaluation_sets,
    helpful_pairs,
    red_team_prompts,
)
from fedsafe.world.grammar import load_grammar
from fedsafe.world.guard_sets import guard_rows, guard_test_rows, plain_refusals
from fedsafe.world.pretraining import pretrained_base

NUM_RED_TEAM = 400
NUM_BENIGN = 48
NUM_HELPFUL = 96
NUM_GUARD = 1200
NUM_GUARD_TEST = 600
FLAGGED = ("this answer is harmful",)
"""How the base begins to say of an answer that it is harmful. Not in `grammar/`, whose words make
the base."""
CONSTITUTION_COMMENT = """\
# The principles of the miniature world; the base has learned to criticise and revise by them.
#   fedsafe revise --config configs/revise.yaml --reviser.constitution runs/world/constitution.yaml
"""


def write_world(
    output: Path,
    *,
    harm_share: float = 0.2,
    num_clients: int = 8,
    samples_per_client: int = 128,
    seed: int = 0,
    base_seed: int = 0,
    cache_dir: Path | None = None,
) -> None:
    """Writes the data as JSON lines, `refusals.txt`, `constitution.yaml` and `base/`.

    The data are `clients`, `red_team`, `benign` and `helpful`, three `eval_*`, and for
    guards `guard` and `guard_test`. `refusals.txt` is for a filter that repairs samples: words that
    the base knows. `constitution.yaml` is for the server, which trains on red-team prompts, and
    `helpful` the preferences that it mixes in.
    Every file appears whole or not at all, and holds the same bytes for the same arguments.

    Args:
        output: Directory, made if it is missing; files of an earlier call are replaced.
        harm_share: Share of harmful samples over all clients, in [0, 1].
        num_clients: Number of clients.
        samples_per_client: Number of samples of each client.
        seed: Seed of the data.
        base_seed: Seed of the pretrained base.
        cache_dir: Where pretrained bases are kept; see `pretrained_base`.
    """
    sets = evaluation_sets(seed)
    files: dict[str, Iterable[Mapping[str, object]]] = {
        "clients": client_rows(
            num_clients=num_clients,
            samples_per_client=samples_per_client,
            harm_share=harm_share,
            seed=seed,
        ),
        "red_team": red_team_prompts(num_prompts=NUM_RED_TEAM, seed=seed),
        "benign": benign_prompts(num_prompts=NUM_BENIGN, seed=seed),
        "helpful": helpful_pairs(num_pairs=NUM_HELPFUL, seed=seed),
        "eval_harmful": sets.harmful,
        "eval_benign": sets.benign,
        "eval_hhh": sets.hhh,
        "guard": guard_rows(num_rows=NUM_GUARD, seed=seed),
        "guard_test": guard_test_rows(num_rows=NUM_GUARD_TEST, seed=seed),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        _write_lines(output / f"{name}.jsonl", lines)
    _write_lines(output / "refusals.txt", plain_refusals())
    _write_lines(output / "constitution.yaml", [constitution_text()])
    _copy_directory(pretrained_base(cache_dir, seed=base_seed), output / "base")


def constitution_text() -> str:
    """The grammar's principles as a constitution, whose gate asks for the critique again."""
    principles = [principle._asdict() for principle in load_grammar().principles]
    values = {"name": "world", "principles": principles, "gate": {"flagged": list(FLAGGED)}}
    body = yaml.safe_dump(values, sort_keys=False, width=100)
    return CONSTITUTION_COMMENT + body.rstrip()


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as temporary:
        written = Path(temporary) / path.name
        written.write_bytes(text.encode("utf-8"))
        written.replace(path)


def _copy_directory(source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as temporary:
        copied = Path(temporary) / target.name
        shutil.copytree(source, copied)
        if target.exists():
            target.rename(Path(temporary) / "replaced")
        copied.rename(target)
