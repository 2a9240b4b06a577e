"""Tokens a second of a client's visit: fedsafe, `transformers.Trainer` and TRL's `SFTTrainer`.

    .venv/bin/python benchmarks/train_throughput.py [--quick] [--device cuda]

All sides train the same model from the same start on the same 64 rows with the same optimizer, in
four optimizer steps. A token is a real token of a row; padding counts for nothing. The sides take
turns in one process, so that what else the machine does hits all alike.
"""

import argparse
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import workload
from rich.console import Console
from rich.table import Table
from sides import Fedsafe, PaddedTrainer, Setting, Side, Visit, fastest_trl
from workload import LARGE, TINY, Cost, Shape

LOSS_TOLERANCE = 1e-3


class Result(NamedTuple):
    """What one side showed."""

    cost: Cost
    """Of a visit, median over the repeats."""
    first_loss: float
    """Of the very first step, before anything is trained."""
    last_loss: float


def compare(sides: Sequence[Side], *, repeats: int) -> list[Result]:
    """One step each to warm up, then whole visits, taking turns."""
    first = [side.visit(first_step_only=True).losses[0] for side in sides]
    visits: list[list[Visit]] = [[] for _ in sides]
    for repeat in range(repeats):
        for side, done in zip(sides, visits, strict=True):
            done.append(side.visit())
            seconds = done[-1].cost.wall_seconds
            print(f"visit {repeat + 1}/{repeats}, {side.name}: {seconds:.1f} s", flush=True)
    return [
        Result(workload.median([visit.cost for visit in done]), loss, done[-1].losses[-1])
        for done, loss in zip(visits, first, strict=True)
    ]


def show(sides: Sequence[Side], results: Sequence[Result], *, num_tokens: int) -> None:
    """Print the table."""
    table = Table("side", "tokens/s", "tokens/CPU s", "seconds", "first loss", "last loss")
    for side, result in zip(sides, results, strict=True):
        table.add_row(
            side.name,
            f"{num_tokens / result.cost.wall_seconds:.0f}",
            f"{num_tokens / result.cost.cpu_seconds:.0f}",
            f"{result.cost.wall_seconds:.2f}",
            f"{result.first_loss:.5f}",
            f"{result.last_loss:.5f}",
        )
    Console(width=120).print(table)


def build_sides(setting: Setting) -> dict[str, Side]:
    """The sides by short names: float32, and fedsafe in bfloat16 too; on a GPU all in bfloat16."""
    dtype = "float32" if setting.device == "cpu" else "bfloat16"
    sides: dict[str, Side] = {"fedsafe": Fedsafe(setting, dtype=dtype)}
    if setting.device == "cpu":
        sides["fedsafe_bf16"] = Fedsafe(setting, dtype="bfloat16")
    sides["hf_trainer"] = PaddedTrainer(setting, dtype=dtype)
    if find_spec("trl") is None:
        print("TRL is not installed, its side is left out; pip install 'fedsafe[bench]'")
    else:
        sides["trl_packing"] = fastest_trl(setting, dtype=dtype)
    return sides


def figures(seconds: dict[str, float], *, num_tokens: int, device: str) -> dict[str, Any]:
    """The ratios and the tokens per second, from each side's seconds."""
    suffix = "fp32" if device == "cpu" else "bf16"
    ratios = {
        f"vs_{peer}_{suffix}": round(seconds[peer] / seconds["fedsafe"], 3)
        for peer in ("hf_trainer", "trl_packing")
        if peer in seconds
    }
    if "fedsafe_bf16" in seconds:
        bf16 = seconds["hf_trainer"] / seconds["fedsafe_bf16"]
        ratios["bf16_vs_hf_trainer_fp32"] = round(bf16, 3)
    speeds = {name: round(num_tokens / each, 1) for name, each in seconds.items()}
    return {**ratios, "tokens_per_second": speeds}


def run(*, quick: bool, device: str, repeats: int) -> dict[str, Any]:
    """Run the benchmark and print its table."""
    shape: Shape = TINY if quick else LARGE
    num_rows, longest, batch_size = (16, 64, 4) if quick else (64, 512, 16)
    lengths = workload.conversation_lengths(num_rows, longest=longest)
    rows = workload.random_rows(lengths, vocabulary=shape.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        base = workload.save_base(shape, Path(folder))
        setting = Setting(base, rows, batch_size, longest, device)
        sides = build_sides(setting)
        results = compare(list(sides.values()), repeats=repeats)
    show(list(sides.values()), results, num_tokens=setting.num_tokens)
    named = dict(zip(sides, results, strict=True))
    difference = abs(named["fedsafe"].first_loss - named["hf_trainer"].first_loss)
    verdict = "agree" if difference <= LOSS_TOLERANCE else "DO NOT AGREE"
    print(f"loss of the first step, fedsafe and transformers.Trainer: {verdict} ({difference:.1e})")
    wall = {name: result.cost.wall_seconds for name, result in named.items()}
    cpu = {name: result.cost.cpu_seconds for name, result in named.items()}
    return {
        "benchmark": "train_throughput",
        "quick": quick,
        **figures(wall, num_tokens=setting.num_tokens, device=device),
        "per_cpu_second": figures(cpu, num_tokens=setting.num_tokens, device=device),
        "trl_layout": sides["trl_packing"].name if "trl_packing" in sides else None,
        "first_loss_difference": difference,
        "tokens": setting.num_tokens,
        "optimizer_steps": setting.num_steps,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **workload.machine(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=None, help="timed visits of each side")
    chosen = parser.parse_args(arguments)
    workload.be_quiet()
    torch.set_num_threads(chosen.threads)
    repeats = chosen.repeats or (1 if chosen.quick else 3)
    workload.print_json(run(quick=chosen.quick, device=chosen.device, repeats=repeats))


if __name__ == "__main__":
    main()
