"""The sides of `train_throughput.py`: fedsafe, `transformers.Trainer`, TRL's `SFTTrainer`."""

import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import workload
from lightning import Callback
from peft import PeftModel
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers import Trainer as HFTrainer
from workload import LEARNING_RATE, LORA, Cost, Stopwatch

from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.schedule import Schedule
from fedsafe.model.lora import add_lora, load_base

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
