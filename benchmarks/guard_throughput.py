"""Conversations a second that a guard judges: fedsafe, and what model cards and scripts do.

    .venv/bin/python benchmarks/guard_throughput.py [--quick] [--device cuda]

All sides ask the same model for the probabilities of the same two labels after the same 64 prompts:
a policy of 700 tokens that all share, then a conversation. The sides take turns in one process, so
that what else the machine does hits all alike.
"""

import argparse
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import workload
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel
from workload import RESERVED_TOKENS, Cost, Shape, Stopwatch

from fedsafe.model.lora import load_base
from fedsafe.safety.next_token import NextTokenScorer

GUARD = Shape(hidden=512, intermediate=1408, layers=8, heads=8, vocabulary=32000, kv_heads=2)
TINY_GUARD = Shape(hidden=32, intermediate=64, layers=2, heads=4, vocabulary=128, kv_heads=2)
LABELS = (5, 6)
ANSWER_TOKENS = 3
"""Line ends, `safe`, end of turn: the shortest answer of Llama Guard 3."""
BATCH_SIZE = 16
MAX_BATCH_TOKENS = 2048


class Prompts(NamedTuple):
    """What the guard is asked."""

    ids: list[list[int]]
    policy: list[int]
    """What all begin with."""


class Side(ABC):
    """One way to get the probabilities of the labels, shape ``(num_prompts, 2)``."""

    name: str

    @abstractmethod
    def probabilities(self, prompts: Sequence[list[int]]) -> Tensor:
        """Ask about some of the prompts."""


class Fedsafe(Side):
    """The policy read once, beforehand; the conversations packed."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        *,
        dtype: str,
        max_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        self.name = f"fedsafe, {dtype}"
        self._scorer = NextTokenScorer(
            model, None, prefixes=[prompts.policy], max_tokens=max_tokens
        )

    def probabilities(self, prompts: Sequence[list[int]]) -> Tensor:
        """Ask."""
        return self._scorer.label_probabilities(prompts, LABELS)


class Generate(Side):
    """`generate` one conversation at a time, as on the model card; the first token's scores."""

    def __init__(self, model: PreTrainedModel, *, dtype: str) -> None:
        self.name = f"generate one by one, {dtype}"
        self._model = model

    def probabilities(self, prompts: Sequence[list[int]]) -> Tensor:
        """Ask."""
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self._model.device)
            output: Any = self._model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=ANSWER_TOKENS,
                max_new_tokens=ANSWER_TOKENS,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
            found.append(output.logits[0].float().softmax(-1)[:, list(LABELS)].cpu())
        return torch.cat(found)


class Forward(Side):
    """One forward pass over padded batches of whole prompts."""

    def __init__(self, model: PreTrainedModel, *, dtype: str) -> None:
        self.name = f"forward, padded batches, {dtype}"
        self._model = model

    @torch.no_grad()
    def probabilities(self, prompts: Sequence[list[int]]) -> Tensor:
        """Ask."""
        batches = [prompts[i : i + BATCH_SIZE] for i in range(0, len(prompts), BATCH_SIZE)]
        return torch.cat([self._batch(batch) for batch in batches])

    def _batch(self, prompts: Sequence[list[int]]) -> Tensor:
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        )
        device = self._model.device
        logits = self._model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            use_cache=False,
            logits_to_keep=1,
        ).logits
        probabilities: Tensor = logits[:, -1].float().softmax(-1)[:, list(LABELS)].cpu()
        return probabilities


def make_prompts(*, quick: bool, vocabulary: int) -> Prompts:
    """Random tokens: one policy, and conversations as long as instruction data."""
    num_prompts, longest, policy_tokens = (8, 48, 64) if quick else (64, 512, 700)
    lengths = workload.conversation_lengths(num_prompts, longest=longest).tolist()
    random = torch.Generator().manual_seed(0)

    def tokens(number: int) -> list[int]:
        return torch.randint(RESERVED_TOKENS, vocabulary, (number,), generator=random).tolist()

    policy = tokens(policy_tokens)
    return Prompts([policy + tokens(length) for length in lengths], policy)


def build_sides(base: Path, prompts: Prompts, *, device: str) -> dict[str, Side]:
    """The sides by short names; on a GPU all in bfloat16."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    model = load_base(str(base), dtype=getattr(torch, dtype)).eval().to(device)
    sides: dict[str, Side] = {"fedsafe": Fedsafe(model, prompts, dtype=dtype)}
    if device == "cpu":
        half = load_base(str(base), dtype=torch.bfloat16).eval()
        sides["fedsafe_bf16"] = Fedsafe(half, prompts, dtype="bfloat16")
    sides["forward"] = Forward(model, dtype=dtype)
    sides["generate"] = Generate(model, dtype=dtype)
    return sides


class Result(NamedTuple):
    """What one side showed."""

    cost: Cost
    """Of all prompts, median over the repeats."""
    probabilities: Tensor


def compare(sides: dict[str, Side], prompts: Prompts, *, repeats: int) -> dict[str, Result]:
    """A few prompts each to warm up, then all of them, taking turns."""
    for side in sides.values():
        side.probabilities(prompts.ids[:4])
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    found = {}
    for repeat in range(repeats):
        for name, side in sides.items():
            watch = Stopwatch()
            found[name] = side.probabilities(prompts.ids)
            costs[name].append(watch.read())
            seconds = costs[name][-1].wall_seconds
            print(f"pass {repeat + 1}/{repeats}, {side.name}: {seconds:.2f} s", flush=True)
    return {name: Result(workload.median(costs[name]), found[name]) for name in sides}


def figures(seconds: dict[str, float], *, num_prompts: int, device: str) -> dict[str, Any]:
    """The ratios and the conversations per second, from each side's seconds."""
    suffix = "fp32" if device == "cpu" else "bf16"
    ratios = {
        f"vs_{peer}_{suffix}": round(seconds[peer] / seconds["fedsafe"], 3)
        for peer in ("generate", "forward")
    }
    if "fedsafe_bf16" in seconds:
        ratios["bf16_vs_generate_fp32"] = round(seconds["generate"] / seconds["fedsafe_bf16"], 3)
    speeds = {name: round(num_prompts / each, 2) for name, each in seconds.items()}
    return {**ratios, "samples_per_second": speeds}


def show(sides: dict[str, Side], results: dict[str, Result], *, num_prompts: int) -> None:
    """Print the table."""
    table = Table("side", "samples/s", "samples/CPU s", "seconds", "difference")
    expected = results["generate"].probabilities
    for name, result in results.items():
        table.add_row(
            sides[name].name,
            f"{num_prompts / result.cost.wall_seconds:.2f}",
            f"{num_prompts / result.cost.cpu_seconds:.2f}",
            f"{result.cost.wall_seconds:.2f}",
            f"{(result.probabilities - expected).abs().max():.1e}",
        )
    Console(width=120).print(table)


def run(*, quick: bool, device: str, repeats: int) -> dict[str, Any]:
    """Run the benchmark and print its table."""
    shape = TINY_GUARD if quick else GUARD
    prompts = make_prompts(quick=quick, vocabulary=shape.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        sides = build_sides(workload.save_base(shape, Path(folder)), prompts, device=device)
    results = compare(sides, prompts, repeats=repeats)
    show(sides, results, num_prompts=len(prompts.ids))
    difference = results["fedsafe"].probabilities - results["generate"].probabilities
    relative = difference.abs() / results["generate"].probabilities
    wall = {name: result.cost.wall_seconds for name, result in results.items()}
    cpu = {name: result.cost.cpu_seconds for name, result in results.items()}
    count = len(prompts.ids)
    return {
        "benchmark": "guard_throughput",
        "quick": quick,
        **figures(wall, num_prompts=count, device=device),
        "max_abs_diff": difference.abs().max().item(),
        "max_relative_diff": relative.max().item(),
        "per_cpu_second": figures(cpu, num_prompts=count, device=device),
        "prompts": count,
        "policy_tokens": len(prompts.policy),
        "conversation_tokens": sum(map(len, prompts.ids)) - count * len(prompts.policy),
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
    parser.add_argument("--repeats", type=int, default=None, help="timed passes of each side")
    chosen = parser.parse_args(arguments)
    workload.be_quiet()
    torch.set_num_threads(chosen.threads)
    repeats = chosen.repeats or (1 if chosen.quick else 3)
    workload.print_json(run(quick=chosen.quick, device=chosen.device, repeats=repeats))


if __name__ == "__main__":
    main()
