"""Tokens a second of a client's visit: fedsafe, `transformers.Trainer` and TRL's `SFTTrainer`.

    .venv/bin/python benchmarks/train_throughput.py [--quick] [--device cuda]

All sides train the same model from the same start on the same 64 rows with the same optimizer, in
four optimizer steps. A token is a real token of a row; padding counts for nothing. The sides take
turns in one process, so that what else the machine does hits all alike.
"""

import argparse
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import workload
from lightning import Callback
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers import Trainer as HFTrainer
from workload import LARGE, LEARNING_RATE, LORA, TINY, Cost, Shape, Stopwatch

from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.schedule import Schedule
from fedsafe.model.lora import add_lora, load_base

LOSS_TOLERANCE = 1e-3
IGNORED = -100


class Setting(NamedTuple):
    """What all sides share."""

    base: Path
    rows: datasets.Dataset
    batch_size: int
    longest: int
    device: str

    @property
    def num_tokens(self) -> int:
        """Real tokens of one visit."""
        return sum(len(ids) for ids in self.rows["input_ids"])

    @property
    def num_steps(self) -> int:
        """Optimizer steps of one visit."""
        return -(-len(self.rows) // self.batch_size)


class Visit(NamedTuple):
    """One pass over the rows."""

    cost: Cost
    """Without the construction of trainers."""
    losses: list[float]
    """Of each optimizer step, nats per answer token, before the step."""


class Side(ABC):
    """One way to train a visit; the adapter goes on from visit to visit."""

    name: str

    @abstractmethod
    def visit(self, *, first_step_only: bool = False) -> Visit:
        """Train all rows once, or only those of the first optimizer step."""


# ---- the sides ----------------------------------------------------------------------------------


class Fedsafe(Side):
    """A round of one client through Lightning's Trainer and `FederatedRounds`."""

    def __init__(self, setting: Setting, *, dtype: str) -> None:
        self.name = f"fedsafe, {dtype}"
        self._setting = setting
        self._module = workload.lora_lm(setting.base, dtype=dtype)

    def visit(self, *, first_step_only: bool = False) -> Visit:
        """Train; aggregation and the writing of files count too."""
        setting = self._setting
        data = workload.TokenRows(setting.rows, num_clients=1, batch_size=setting.batch_size)
        num_steps = 1 if first_step_only else setting.num_steps
        rounds = FederatedRounds(clients_per_round=1, local_steps=num_steps)
        losses, clock = _StepLosses(), workload.RoundClock()
        with tempfile.TemporaryDirectory() as folder:
            workload.fit(
                self._module,
                data,
                rounds,
                num_rounds=1,
                run_dir=Path(folder),
                callbacks=[losses, clock],
                device=setting.device,
            )
        return Visit(clock.cost(0), [loss.item() for loss in losses.steps])


class _StepLosses(Callback):
    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, _: int
    ) -> None:
        self.steps.append(outputs["nll_sum"] / batch.normalizer)


class PaddedTrainer(Side):
    """`transformers.Trainer`: padded batches and the model's own loss.

    OpenFedLLM and FlowerTune train like this.
    """

    def __init__(self, setting: Setting, *, dtype: str) -> None:
        self.name = f"transformers.Trainer, padded, {dtype}"
        self._setting = setting
        self._model = peer_model(setting, dtype=dtype)
        self._rows = peer_rows(setting)

    def visit(self, *, first_step_only: bool = False) -> Visit:
        """Train."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = HFTrainer(
                self._model,
                TrainingArguments(
                    **peer_arguments(self._setting, folder, first_step_only=first_step_only),
                    per_device_train_batch_size=self._setting.batch_size,
                    train_sampling_strategy="sequential",
                ),
                train_dataset=self._rows,
                data_collator=DataCollatorForSeq2Seq(
                    workload.word_tokenizer(), label_pad_token_id=IGNORED
                ),
            )
            return run_peer(trainer)


class Layout(NamedTuple):
    """How TRL lays rows out: its settings that remove padding, and what one step is made of."""

    name: str
    settings: dict[str, Any]
    packs_per_step: bool
    """Whether an optimizer step accumulates over packs, one at a time."""


LAYOUTS = (
    Layout("bfd packs together", {"packing": True}, packs_per_step=False),
    Layout("bfd packs one by one", {"packing": True}, packs_per_step=True),
    Layout("padding-free batch", {"padding_free": True, "max_length": None}, packs_per_step=False),
)
"""The correct ones that run on any device. `wrapped` packing cuts rows and lets samples see each
other; flash attention needs a GPU, and flex attention has no backward pass on a CPU."""


class PackedTRL(Side):
    """TRL's `SFTTrainer` without padding, loss on answer tokens alone."""

    def __init__(self, setting: Setting, model: PeftModel, layout: Layout, *, dtype: str) -> None:
        self.name = f"TRL SFTTrainer, {layout.name}, {dtype}"
        self._setting = setting
        self._model = model
        self._layout = layout
        self._rows = peer_rows(setting).remove_columns("attention_mask")

    def visit(self, *, first_step_only: bool = False) -> Visit:
        """Train."""
        with tempfile.TemporaryDirectory() as folder:
            return run_peer(self._trainer(folder, first_step_only=first_step_only))

    def _trainer(self, folder: str, *, first_step_only: bool) -> HFTrainer:
        from trl import SFTConfig, SFTTrainer

        batch, accumulation = self._batches()
        settings = {"max_length": self._setting.longest, **self._layout.settings}
        arguments = SFTConfig(
            **peer_arguments(self._setting, folder, first_step_only=first_step_only),
            **settings,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=False,
            bf16=False,  # the weights have their type already, as on the other sides
        )
        return SFTTrainer(
            self._model,
            arguments,
            train_dataset=self._rows,
            processing_class=workload.word_tokenizer(),
        )

    def _batches(self) -> tuple[int, int]:
        """Batch size and accumulation that give as many optimizer steps as the others take."""
        if not self._layout.settings.get("packing"):
            return self._setting.batch_size, 1
        per_step = -(-self._num_packs() // self._setting.num_steps)
        return (1, per_step) if self._layout.packs_per_step else (per_step, 1)

    def _num_packs(self) -> int:
        from trl.data_utils import pack_dataset

        return len(pack_dataset(self._rows, self._setting.longest, "bfd"))


# ---- what the peers share -----------------------------------------------------------------------


def peer_model(setting: Setting, *, dtype: str) -> PeftModel:
    """The same base with the same adapter, with transformers' own attention."""
    base = load_base(str(setting.base), dtype=getattr(torch, dtype))
    lora = {**LORA, "target_modules": list(LORA["target_modules"])}
    return add_lora(base, dropout=0.0, seed=0, **lora).to(setting.device).train()


def peer_rows(setting: Setting) -> datasets.Dataset:
    """The rows with labels, in the order in which fedsafe visits them."""
    schedule = Schedule(
        workload.deal(len(setting.rows), num_clients=1),
        num_rounds=1,
        clients_per_round=1,
        batch_size=setting.batch_size,
        local_epochs=1,
    )
    order = [i for key in schedule.plan(0).batches() for i in key.samples.tolist()]
    return setting.rows.select(order).map(_labelled, remove_columns=["answer_mask"])


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    ids, mask = row["input_ids"], row["answer_mask"]
    labels = [token if answer else IGNORED for token, answer in zip(ids, mask, strict=True)]
    return {"labels": labels, "attention_mask": [1] * len(ids)}


def peer_arguments(setting: Setting, folder: str, *, first_step_only: bool) -> dict[str, Any]:
    """Settings that make a peer's visit the same training as fedsafe's."""
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "max_steps": 1 if first_step_only else -1,
        "optim": "adamw_torch",
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": setting.device == "cpu",
    }


def run_peer(trainer: HFTrainer) -> Visit:
    """Train; timed from the first batch to the last step."""
    timer = _TrainTimer()
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(timer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return Visit(timer.cost, [float(loss) for loss in losses])


class _TrainTimer(TrainerCallback):
    cost: Cost

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._watch = Stopwatch()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.cost = self._watch.read()


def fastest_trl(setting: Setting, *, dtype: str) -> PackedTRL:
    """TRL in the layout that trains the first rows fastest."""
    model = peer_model(setting, dtype=dtype)
    few = setting._replace(rows=setting.rows.select(range(setting.batch_size)))
    seconds = []
    for layout in LAYOUTS:
        side = PackedTRL(few, model, layout, dtype=dtype)
        seconds.append(side.visit().cost.wall_seconds)
        speed = few.num_tokens / seconds[-1]
        print(f"TRL, {layout.name}: {speed:.0f} tokens/s on the first rows", flush=True)
    best = LAYOUTS[seconds.index(min(seconds))]
    return PackedTRL(setting, peer_model(setting, dtype=dtype), best, dtype=dtype)


# ---- the comparison -----------------------------------------------------------------------------


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
