"""What fedsafe does on one GPU with a model of 8 billion parameters, beside what a user would run.

    .venv/bin/python benchmarks/gpu.py [--only rate,train,chat,guard,revision,adapter,zero]

The model has Llama-3.1-8B's shape and random weights in bfloat16; its adapter is LoRA of rank 16
and alpha 32 on all linear layers (42 million parameters, float32). Each section prints a line of
JSON when it is done. Without a GPU nothing is measured; `--quick --device cpu` tries the script on
a tiny model.

- `rate`: the card's matrix rate in bfloat16, the median of 20 products of 8192 x 8192 x 8192.
- `train`: visits on rows of 2,048 tokens, 8 a step, against `transformers.Trainer` with PEFT. The
  peer runs without gradient checkpointing on as many rows at a time as fit, and with it on all of a
  step; the faster one counts. Fedsafe runs without it, and once more with `compile`.
- `chat`: the same on rows of chat length, 16 a step, which the peer pads.
- `guard`: a policy of 700 tokens and 64 conversations, against `generate` one by one (the model
  card's way). Each side does it twice: cuDNN plans anew for each length that it has not seen, which
  slows `generate`; the lead is that of the second pass, the first one has a figure of its own.
- `revision`: red response, critique and revision of 48 tokens each, against `generate` one by one;
  twice too.
- `adapter`: reading and writing the adapter, and taking a client's into the mean.
- `zero`: visits on 16 of the long rows under DeepSpeed ZeRO-2 and ZeRO-3 on this one GPU.

Model FLOPs utilisation (`mfu`) is what training needs, over the seconds and the measured rate. Of T
tokens, of which N have a loss, in samples of L_i tokens, it needs

    4 P T + 6 n T + 4 V D N + 6 D layers sum_i L_i^2

P being the frozen weights of the linear layers (forward and the gradient of the activations; they
have no gradient of their own), n those of the adapter, V D the output layer's, and the last term
attention, causal, so that half of each square counts. What is computed twice counts once.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import workload
from gpu_training import (
    LORA,
    RandomLM,
    Run,
    Work,
    dtype_on,
    fedsafe_visits,
    make_rows,
    model_flops,
    peak_gib,
    peer_visits,
    random_base,
    start_measuring,
)
from workload import TINY, Shape

from fedsafe.federated.aggregation import WeightedMean

EIGHT_B = Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256)
GUARD_BATCH_TOKENS = 4096
"""Of conversations that are judged together: the default of `GuardModel`."""


class Options(NamedTuple):
    """What is run, and how much of it."""

    quick: bool
    device: str
    repeats: int

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return TINY if self.quick else EIGHT_B


# ---- the card ---------------------------------------------------------------------------------


def matrix_rate(options: Options) -> float:
    """Floating-point operations a second of a large product in the base's type."""
    size = 256 if options.quick else 8192
    dtype = getattr(torch, dtype_on(options.device))
    left, right = (torch.randn(size, size, device=options.device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: torch.mm(left, right)) for _ in range(25)]
    return 2 * size**3 / statistics.median(seconds[5:])


def timed(work: Callable[[], Any]) -> float:
    """Seconds until a piece of work is done, on the GPU too."""
    watch = workload.Stopwatch()
    work()
    return watch.read().wall_seconds


def section_rate(options: Options) -> dict[str, Any]:
    """The card's matrix rate."""
    return {"matrix_tflops": round(matrix_rate(options) / 1e12, 1)}


# ---- training ---------------------------------------------------------------------------------


def long_work(options: Options) -> Work:
    """Rows of 2,048 tokens; four of them go through the model at a time."""
    number, longest = (4, 32) if options.quick else (32, 2048)
    rows = make_rows([longest] * number, vocabulary=options.shape.vocabulary)
    batch_size = 2 if options.quick else 8
    return Work("train", options.shape, rows, batch_size, 2, options.device)


def chat_work(options: Options) -> Work:
    """Rows as long as instruction data; a whole step goes through the model at once."""
    number, longest = (8, 48) if options.quick else (128, 512)
    lengths = workload.conversation_lengths(number, longest=longest).tolist()
    rows = make_rows(lengths, vocabulary=options.shape.vocabulary)
    return Work("chat", options.shape, rows, 4 if options.quick else 16, 1, options.device)


def section_train(options: Options) -> dict[str, Any]:
    """Visits on long rows."""
    work = long_work(options)
    ways = [(False, work.batch_size // 4 or 1), (True, work.batch_size)]
    return compare_visits(work, options, ways=ways)


def section_chat(options: Options) -> dict[str, Any]:
    """Visits on rows of chat length."""
    work = chat_work(options)
    return compare_visits(
        work, options, ways=[(False, work.batch_size // 4), (True, work.batch_size)]
    )


def compare_visits(
    work: Work, options: Options, *, ways: Sequence[tuple[bool, int]]
) -> dict[str, Any]:
    """Fedsafe, compiled and not, and the peer's ways: checkpointing and rows at a time."""
    runs = {"fedsafe": fedsafe_visits(work, repeats=options.repeats, name="fedsafe")}
    if options.device == "cuda":  # on a CPU the compiler alone takes minutes
        runs["fedsafe_compiled"] = fedsafe_visits(
            work, repeats=options.repeats, name="fedsafe, compiled", compile=True
        )
    for number, (checkpointing, rows) in enumerate(ways):
        name = f"hf_trainer_{number + 1}"
        try:
            runs[name] = peer_visits(
                work, repeats=options.repeats, checkpointing=checkpointing, rows_at_a_time=rows
            )
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", flush=True)
    return figures_of_visits(work, options, runs)


def figures_of_visits(work: Work, options: Options, runs: dict[str, Run]) -> dict[str, Any]:
    """Tokens a second, their share of the card's rate, and the lead over the fastest peer."""
    rate = matrix_rate(options)
    flops = model_flops(
        work.shape,
        work.lengths,
        num_answer_tokens=work.num_answer_tokens,
        num_lora=num_lora(work.shape),
    )
    peers = [run.seconds for name, run in runs.items() if name.startswith("hf_trainer")]
    best = min(runs[name].seconds for name in runs if name.startswith("fedsafe"))
    return {
        "vs_hf_trainer": round(min(peers) / best, 3) if peers else None,
        "sides": {name: run.name for name, run in runs.items()},
        "tokens_per_second": {n: round(work.num_tokens / run.seconds) for n, run in runs.items()},
        "mfu": {name: round(flops / run.seconds / rate, 4) for name, run in runs.items()},
        "peak_gib": {name: round(run.peak_gib, 1) for name, run in runs.items()},
        "round_end_seconds": round(runs["fedsafe"].round_end_seconds, 3),
        "first_loss": {name: round(run.first_loss, 4) for name, run in runs.items()},
        "matrix_tflops": round(rate / 1e12, 1),
        "tokens": work.num_tokens,
        "optimizer_steps": work.num_steps,
    }


def num_lora(shape: Shape) -> int:
    """Parameters of the adapter."""
    kv = shape.hidden // shape.heads * (shape.kv_heads or shape.heads)
    into_and_out_of = [shape.hidden + shape.hidden] * 2 + [shape.hidden + kv] * 2
    into_and_out_of += [shape.hidden + shape.intermediate] * 3
    return int(LORA["rank"] * shape.layers * sum(into_and_out_of))


def section_zero(options: Options) -> dict[str, Any]:
    """DeepSpeed's stages 2 and 3 on one GPU, where they have nothing to share out."""
    if options.device == "cpu" or find_spec("deepspeed") is None:
        return {"left_out": "ZeRO needs a CUDA device and DeepSpeed"}
    from fedsafe.strategies.zero import Stage, ZeroStrategy

    work = long_work(options)
    half = work.rows.select(range(len(work.rows) // 2))
    work = work._replace(rows=half, parts=work.batch_size // 2)  # ZeRO-3 has copies of its own
    runs = {"fedsafe": fedsafe_visits(work, repeats=options.repeats, name="fedsafe")}
    stages: tuple[Stage, ...] = (2, 3)
    for stage in stages:
        runs[f"zero_{stage}"] = fedsafe_visits(
            work,
            repeats=options.repeats,
            name=f"ZeRO-{stage}",
            strategy=ZeroStrategy(stage=stage),
        )
    return figures_of_visits(work, options, runs)


# ---- guard and revision -----------------------------------------------------------------------


def section_guard(options: Options) -> dict[str, Any]:
    """Conversations a second that a guard judges."""
    import guard_throughput as guard

    start_measuring()
    dtype = dtype_on(options.device)
    prompts = guard.make_prompts(quick=options.quick, vocabulary=options.shape.vocabulary)
    model = random_base(options.shape, device=options.device).eval()
    sides: dict[str, guard.Side] = {
        "fedsafe": guard.Fedsafe(model, prompts, dtype=dtype, max_tokens=GUARD_BATCH_TOKENS),
        "generate": guard.Generate(model, dtype=dtype),
    }
    new, seen = (guard.compare(sides, prompts, repeats=1) for _ in range(2))
    speeds = {
        name: [len(prompts.ids) / each[name].cost.wall_seconds for each in (new, seen)]
        for name in sides
    }
    ours, theirs = (seen[name].probabilities for name in ("fedsafe", "generate"))
    return {
        "vs_generate": round(speeds["fedsafe"][1] / speeds["generate"][1], 2),
        "vs_generate_new_lengths": round(speeds["fedsafe"][0] / speeds["generate"][0], 2),
        "samples_per_second": {name: [round(x, 2) for x in each] for name, each in speeds.items()},
        "mean_relative_diff": float(((ours - theirs).abs() / theirs).mean()),
        "peak_gib": round(peak_gib(), 1),
    }


def section_revision(options: Options) -> dict[str, Any]:
    """Prompts a second that a model answers, criticises and revises."""
    import revision_throughput as revision

    start_measuring()
    ours, theirs = (4, 2) if options.quick else (64, 2)
    longest = 48 if options.quick else 512
    base = random_base(options.shape, device=options.device)
    work = revision.work_on(
        base, options.shape, lora=LORA, num_prompts=ours, longest=longest, device=options.device
    )
    speakers = {
        "fedsafe": (revision.ModelSpeaker(work.model, work.tokenizer), ours),
        "one_by_one": (revision.OneByOne(work.model, work.tokenizer), theirs),
    }
    speeds: dict[str, list[float]] = {name: [] for name in speakers}
    for name in [*speakers] * 2:
        speaker, number = speakers[name]
        turns = partial(revision.three_turns, speaker, work, "global", num_prompts=number)
        speeds[name].append(number / timed(turns))
        print(f"{name}: {number} prompts, {speeds[name][-1]:.2f} a second", flush=True)
    return {
        "vs_one_by_one": round(speeds["fedsafe"][1] / speeds["one_by_one"][1], 2),
        "vs_one_by_one_new_lengths": round(speeds["fedsafe"][0] / speeds["one_by_one"][0], 2),
        "prompts_per_second": {name: [round(x, 3) for x in each] for name, each in speeds.items()},
        "prompts": {"fedsafe": ours, "one_by_one": theirs},
        "peak_gib": round(peak_gib(), 1),
    }


# ---- the adapter ------------------------------------------------------------------------------


def section_adapter(options: Options) -> dict[str, Any]:
    """Milliseconds of what a round does with adapters, each the median of ten."""
    start_measuring()
    module = RandomLM(options.shape, device=options.device)
    module.configure_model()
    adapter = module.flat_adapter()
    update = adapter.read()
    mean = WeightedMean(update)
    steps: dict[str, Callable[[], Any]] = {
        "read": adapter.read,
        "write": lambda: adapter.write(update),
        "into_the_mean": lambda: mean.add(update, weight=2.0),
        "mean": mean.mean,
    }
    found = {name: [timed(step) for _ in range(11)][1:] for name, step in steps.items()}
    milliseconds = {name: 1e3 * statistics.median(each) for name, each in found.items()}
    between = milliseconds["read"] + milliseconds["into_the_mean"] + milliseconds["write"]
    return {
        "milliseconds": {name: round(each, 3) for name, each in milliseconds.items()},
        "milliseconds_between_clients": round(between, 3),
        "parameters": adapter.num_params,
    }


# ---- running ----------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "rate": section_rate,
    "train": section_train,
    "chat": section_chat,
    "guard": section_guard,
    "revision": section_revision,
    "adapter": section_adapter,
    "zero": section_zero,
}


def run(options: Options, names: Sequence[str]) -> None:
    """Run some sections; each prints its line at once."""
    for name in names:
        began = time.perf_counter()
        figures = SECTIONS[name](options)
        gc.collect()
        workload.print_json(
            {
                "benchmark": "gpu",
                "section": name,
                "quick": options.quick,
                **figures,
                "repeats": options.repeats,
                "section_seconds": round(time.perf_counter() - began, 1),
                "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
                **workload.machine(),
            }
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--repeats", type=int, default=None, help="timed runs of each side")
    chosen = parser.parse_args(arguments)
    names = chosen.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"--only has {unknown[0]}; the sections are {', '.join(SECTIONS)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print(
            "This needs a GPU and sees none, so there are no figures. "
            "To try the script on a tiny model: --quick --device cpu"
        )
        return
    if chosen.device == "cpu" and not chosen.quick:
        parser.error("an 8B model is not for a CPU; add --quick to try the script on a tiny one")
    workload.be_quiet()
    run(Options(chosen.quick, chosen.device, chosen.repeats or (1 if chosen.quick else 2)), names)


if __name__ == "__main__":
    main()
