"""Writes the miniature world to a directory, as the files that a user would bring."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedsafe.world.generator import (
    benign_prompts,
    client_rows,
    evaluation_sets,
    red_team_prompts,
)
from fedsafe.world.pretraining import pretrained_base

NUM_RED_TEAM = 48
NUM_BENIGN = 48


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
    """Writes `clients.jsonl`, `red_team.jsonl`, `benign.jsonl`, three `eval_*.jsonl` and `base/`.

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
        "eval_harmful": sets.harmful,
        "eval_benign": sets.benign,
        "eval_hhh": sets.hhh,
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        _write_jsonl(output / f"{name}.jsonl", rows)
    _copy_directory(pretrained_base(cache_dir, seed=base_seed), output / "base")


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
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
