"""The runs of a table: cells, which are trained and evaluated, and guards, trained and measured.

Each is one `fedsafe fit` in a folder and a process of its own. What it found is kept: the same
settings are not run again, and an interrupted run goes on where it stopped.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from fedsafe import __version__
from fedsafe.data.sources import load_samples
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.evaluation.guard_evaluation import measure_guard
from fedsafe.evaluation.guard_metrics import GuardScores
from fedsafe.federated.round_log import RoundLog, cai_costs
from fedsafe.model.lora import load_base
from fedsafe.model.pretrained import load_trained
from fedsafe.safety.guard_model import GuardModel
from fedsafe.world.evaluation import evaluate
from fedsafe.world.grammar import load_grammar
from fedsafe.world.guard_sets import taught_categories

Fit = Callable[[list[str]], None]
"""Runs `fedsafe fit` with these arguments."""

_GUARD_CLASS = f"{GuardModel.__module__}.{GuardModel.__qualname__}"
_GUARD_FORMAT = "world"


@dataclass
class Row:
    """One method of the table.

    Attributes:
        method: Name of the method, such as `fl`.
        aggregation: Name of the aggregation, or `none` where nothing is trained.
        configs: Configuration files of `fedsafe fit`, later over earlier; none is the base alone.
        harm_share: Share of harmful stand-ins in the clients' data, 0 to 1.
        guard: Name of the table's guard that filters the clients' data; None filters nothing.
    """

    method: str
    aggregation: str = "none"
    configs: tuple[str, ...] = ()
    harm_share: float = 0.2
    guard: str | None = None

    @property
    def has_cai(self) -> bool:
        """Whether its configurations have constitutional training, whose data are its world's."""
        settings = [yaml.safe_load(Path(config).read_text()) or {} for config in self.configs]
        return any((each.get("data") or {}).get("cai") for each in settings)


@dataclass
class TableGuard:
    """A guard that is trained once, for every row and seed that wants it.

    Attributes:
        name: What rows call it.
        configs: Configuration files of the `fedsafe fit` that trains it, later over earlier.
        from_scratch: Whether these give it random weights (`model.from_config`) in place of the
            miniature's base.
    """

    name: str
    configs: tuple[str, ...]
    from_scratch: bool = False


class GuardRun(NamedTuple):
    """One guard, with everything a process needs to train it."""

    guard: TableGuard
    seed: int
    world: Path
    folder: Path

    @property
    def base(self) -> Path:
        """What its adapter is trained on; random weights are written by the fit."""
        return (self.folder / "fit" if self.guard.from_scratch else self.world) / "base"

    @property
    def adapter(self) -> Path:
        """Where the fit writes it."""
        return self.folder / "fit" / "adapter"

    def digest(self) -> str:
        """Changes whenever its settings or the version do."""
        return _digest(asdict(self.guard), self.guard.configs, self.seed)


class Cell(NamedTuple):
    """One row at one seed, with everything a process needs to run it."""

    row: Row
    seed: int
    world: Path
    folder: Path
    guard: GuardRun | None = None

    def digest(self) -> str:
        """Changes whenever its settings, its guard's or the version do."""
        guard = self.guard.digest() if self.guard is not None else ""
        return _digest(asdict(self.row), self.row.configs, self.seed, guard)


def run_cell(cell: Cell, fit: Fit) -> dict[str, Any]:
    """Train and evaluate one cell, or read what an earlier call found under the same settings."""
    about = {"method": cell.row.method, "aggregation": cell.row.aggregation, "seed": cell.seed}
    return _kept(cell.folder, cell.digest(), lambda: about | _train_and_evaluate(cell, fit))


def run_guard(run: GuardRun, fit: Fit) -> dict[str, Any]:
    """Train one guard and measure it before and after, or read what an earlier call found."""
    return _kept(run.folder, run.digest(), lambda: _train_and_measure(run, fit))


# ---- what is kept --------------------------------------------------------------------------------


def _kept(folder: Path, digest: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in a folder, made if there is none of the same settings; `seconds` it took."""
    torch.set_num_threads(1)
    kept = folder / "result.json"
    if kept.exists():
        result: dict[str, Any] = json.loads(kept.read_text())
        if result.pop("digest") == digest:
            return result
    started = time.perf_counter()
    _clear_other_settings(folder, digest)
    with _output_to(folder / "log.txt"):
        result = make()
    result["seconds"] = round(time.perf_counter() - started, 2)
    scratch = kept.with_suffix(".tmp")
    scratch.write_text(json.dumps({**result, "digest": digest}))
    scratch.replace(kept)
    return result


def _clear_other_settings(folder: Path, digest: str) -> None:
    """Remove what a run left under other settings: a half-done one of theirs must not go on."""
    stamp = folder / "settings"
    if not stamp.exists() or stamp.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(digest)


def _digest(settings: Mapping[str, Any], configs: Sequence[str], *others: object) -> str:
    texts = [__version__, json.dumps(settings), *map(str, others)]
    texts += [Path(config).read_text() for config in configs]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Send what this process prints, libraries included, to a file."""
    saved = os.dup(1), os.dup(2)
    with file.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        except Exception:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _run_fit(fit: Fit, folder: Path, configs: Sequence[str], overrides: dict[str, Any]) -> Path:
    """Run a fit in a folder, or let a half-done one go on; returns its run directory."""
    run_dir, file = folder / "fit", folder / "overrides.yaml"
    file.write_text(yaml.safe_dump({**overrides, "run_dir": str(run_dir)}))
    arguments = [part for config in (*configs, str(file)) for part in ("--config", config)]
    if run_dir.exists():
        arguments += ["--ckpt_path", "last"]
    fit(arguments)
    return run_dir


# ---- cells ---------------------------------------------------------------------------------------


def _train_and_evaluate(cell: Cell, fit: Fit) -> dict[str, Any]:
    base = str(cell.world / "base")
    if not cell.row.configs:
        return {"metrics": evaluate(load_base(base), load_tokenizer(base), seed=cell.seed)}
    run_dir = _run_fit(fit, cell.folder, cell.row.configs, _cell_overrides(cell))
    adapted, tokenizer = load_trained(run_dir / "adapter", base=base)
    result: dict[str, Any] = {"metrics": evaluate(adapted, tokenizer, seed=cell.seed)}
    if cell.guard is not None:
        result["filter"] = _filter_counts(run_dir / "filter.json")
    if cell.row.has_cai:
        result["cai"] = cai_costs(RoundLog(run_dir / "rounds.jsonl").read())
    return result


def _cell_overrides(cell: Cell) -> dict[str, Any]:
    """What a cell changes in the configuration of its row."""
    data: dict[str, Any] = {"path": str(cell.world / "clients.jsonl")}
    if cell.guard is not None:
        settings = _guard_settings(cell.guard)
        data["filter"] = {"guard": {"class_path": _GUARD_CLASS, "init_args": settings}}
    openings = list(load_grammar().refusal_openings)
    if cell.row.has_cai:
        constitution = str(cell.world / "constitution.yaml")
        data["cai"] = {
            "prompts": str(cell.world / "red_team.jsonl"),
            "helpful": str(cell.world / "helpful.jsonl"),
            "reviser": {"constitution": constitution, "openings": openings},
        }
    probe = {
        "path": str(cell.world / "red_team.jsonl"),
        "temperature": 1.0,
        "openings": openings,
    }
    probe_class = "fedsafe.evaluation.refusal_probe.RefusalProbe"
    return {
        "seed_everything": cell.seed,
        "model": {"base": str(cell.world / "base")},
        "data": data,
        "trainer": {"callbacks": [{"class_path": probe_class, "init_args": probe}]},
    }


def _filter_counts(file: Path) -> dict[str, int]:
    """What a filter did to the samples that clients would have trained on, in numbers."""
    done = json.loads(file.read_text())
    total = done["total"]
    return {
        **{name: total[name] for name in ("judged", "unsafe", "dropped", "refused")},
        "harm": total["hits"] + total["misses"],
        "harm_left": total["misses"] + (total["hits"] if done["policy"] == "keep" else 0),
    }


# ---- guards --------------------------------------------------------------------------------------


def _guard_settings(run: GuardRun) -> dict[str, Any]:
    """The trained guard, as arguments of `GuardModel`."""
    return {
        "format": _GUARD_FORMAT,
        "model": str(run.base),
        "adapter": str(run.adapter),
        "name": run.guard.name,
    }


def _train_and_measure(run: GuardRun, fit: Fit) -> dict[str, Any]:
    data = {"path": str(run.world / "guard.jsonl"), "tokenizer": str(run.world / "base")}
    overrides: dict[str, Any] = {"seed_everything": run.seed, "data": data}
    if not run.guard.from_scratch:
        overrides["model"] = {"base": str(run.base)}
    _run_fit(fit, run.folder, run.guard.configs, overrides)
    untrained = GuardModel(
        _GUARD_FORMAT,
        model=str(run.base),
        name=f"{run.guard.name}-untrained",
        min_label_mass=0.0,  # it knows nothing of the labels yet
    )
    stages = {"before": untrained, "after": GuardModel(**_guard_settings(run))}
    samples = load_samples(str(run.world / "guard_test.jsonl"))
    measured = {stage: measure_guard(guard, samples) for stage, guard in stages.items()}
    return {
        "stages": [
            {
                "name": run.guard.name,
                "stage": stage,
                **result.overall._asdict(),
                **_recall_by_teaching(result.by_category),
            }
            for stage, result in measured.items()
        ]
    }


def _recall_by_teaching(scores: Mapping[str, GuardScores]) -> dict[str, float]:
    """Recall on the harm of categories that the guard was shown in training, and of the others."""
    grammar = load_grammar()
    taught = taught_categories(grammar)
    return {
        "recall_taught": _recall(scores, taught),
        "recall_untaught": _recall(scores, set(grammar.categories) - set(taught)),
    }


def _recall(scores: Mapping[str, GuardScores], categories: Collection[str]) -> float:
    """Over several categories, all of which have harm in them."""
    parts = [scores[name] for name in categories]
    found = sum((part.recall or 0.0) * part.unsafe for part in parts)
    return found / sum(part.unsafe for part in parts)
