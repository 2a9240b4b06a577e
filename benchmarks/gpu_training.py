"""The training sections of `gpu.py`: a client's visit in fedsafe and in `transformers.Trainer`."""

import gc
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import workload
from lightning import Callback
from lightning.pytorch.strategies import Strategy
from peft import LoraConfig, get_peft_model
from sides import IGNORED, Setting, peer_rows, run_peer
from transformers import DataCollatorForSeq2Seq, TrainingArguments
from transformers import Trainer as HFTrainer
from workload import LEARNING_RATE, Cost, Shape

from fedsafe.federated.rounds import FederatedRounds
from fedsafe.model.attention import PACKED
from fedsafe.model.lora import load_base
from fedsafe.model.module import LoraLM

LORA: dict[str, Any] = {"rank": 16, "alpha": 32.0, "target_modules": "all-linear"}


class Work(NamedTuple):
    """What is trained on."""

    name: str
    shape: Shape
    rows: datasets.Dataset
    batch_size: int
    """Rows of an optimizer step."""
    parts: int
    """Into which a step is split; gradients are accumulated over them."""
    device: str

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(ids) for ids in self.rows["input_ids"]]

    @property
    def num_tokens(self) -> int:
        """Real tokens of one visit."""
        return sum(self.lengths)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of one visit that have a loss."""
        return sum(sum(mask) for mask in self.rows["answer_mask"])

    @property
    def rows_at_a_time(self) -> int:
        """That go through the model together."""
        return self.batch_size // self.parts

    @property
    def num_steps(self) -> int:
        """Optimizer steps of one visit."""
        return len(self.rows) // self.batch_size


class Run(NamedTuple):
    """What one side showed."""

    name: str
    costs: list[Cost]
    """Of each visit, the first left out."""
    peak_gib: float
    """The most that was allocated on the GPU; 0 on a CPU."""
    first_loss: float
    """Of the very first step, nats per answer token."""
    round_end_seconds: float = 0.0
    """What a round takes after its visits: its adapter and its line are written."""

    @property
    def seconds(self) -> float:
        """Of a visit, the median."""
        return workload.median(self.costs).wall_seconds


# ---- what a visit takes -----------------------------------------------------------------------


def model_flops(
    shape: Shape, lengths: Sequence[int], *, num_answer_tokens: int, num_lora: int
) -> float:
    """Floating-point operations that LoRA training on some samples needs; see `gpu.py`."""
    head = shape.hidden // shape.heads
    kv = head * (shape.kv_heads or shape.heads)
    of_layer = 2 * shape.hidden * (shape.hidden + kv) + 3 * shape.hidden * shape.intermediate
    num_tokens = sum(lengths)
    frozen = 4 * shape.layers * of_layer * num_tokens
    output = 4 * shape.vocabulary * shape.hidden * num_answer_tokens
    attention = 6 * shape.layers * shape.hidden * sum(length**2 for length in lengths)
    return float(frozen + output + 6 * num_lora * num_tokens + attention)


# ---- fedsafe ----------------------------------------------------------------------------------


class RandomLM(LoraLM):
    """`LoraLM` on a random base, which is made where it is trained and is not worth a file."""

    def __init__(self, shape: Shape, *, device: str, **settings: Any) -> None:
        super().__init__(
            "(random)",
            dtype=dtype_on(device),  # type: ignore[arg-type]
            learning_rate=LEARNING_RATE,
            **LORA,
            **settings,
        )
        self._make_base = partial(random_base, shape, device=device, attention=PACKED)

    def make_base(self) -> Any:
        """The base."""
        return self._make_base()


def random_base(shape: Shape, *, device: str, attention: str = "sdpa") -> Any:
    """The same random weights each time, made where they are used."""
    dtype = getattr(torch, dtype_on(device))
    with torch.device(device):
        return load_base("llama", from_config=shape.config(), dtype=dtype, attention=attention)


def fedsafe_visits(
    work: Work,
    *,
    repeats: int,
    name: str,
    strategy: Strategy | str = "auto",
    **settings: Any,
) -> Run:
    """Rounds of one client through Lightning's Trainer.

    A visit is timed from the loading of its data until its adapter is in the mean.

    Args:
        work: What to train on.
        repeats: Visits that are timed, after one that is not.
        name: Of the side.
        strategy: How Lightning runs it.
        **settings: Of `LoraLM`.
    """
    start_measuring()
    module = RandomLM(work.shape, device=work.device, **settings)
    data = workload.TokenRows(work.rows, num_clients=1, batch_size=work.batch_size)
    rounds = FederatedRounds(clients_per_round=1, local_steps=work.num_steps)
    losses, clock = FirstLoss(), VisitClock()
    with tempfile.TemporaryDirectory() as folder:
        workload.fit(
            module,
            data,
            rounds,
            num_rounds=1 + repeats,
            run_dir=Path(folder),
            callbacks=[losses, clock],
            device=work.device,
            accumulate=work.parts,
            strategy=strategy,
        )
    found = Run(name, clock.visits[1:], peak_gib(), losses.mean(), clock.round_end_seconds())
    print(f"{work.name}, {name}: {found.seconds:.2f} s a visit", flush=True)
    return found


class VisitClock(Callback):
    """When visits began and ended, one a round; put it after `FederatedRounds`."""

    def __init__(self) -> None:
        self.visits: list[Cost] = []
        self._ends: list[Cost] = []
        self._watch = workload.Stopwatch()

    def on_train_epoch_start(self, *args: Any) -> None:
        """A round begins."""
        self._watch.start()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A visit may be over; the server has its update."""
        if batch.key.ends_visit:
            self.visits.append(self._watch.read())

    def on_train_epoch_end(self, *args: Any) -> None:
        """The round's files are written."""
        self._ends.append(self._watch.read() - self.visits[-1])

    def round_end_seconds(self) -> float:
        """From the end of a visit to that of its round, the median."""
        return workload.median(self._ends[1:]).wall_seconds


class FirstLoss(Callback):
    """The loss of the first optimizer step."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take this part of it."""
        if batch_idx < batch.key.num_micro and batch.key.round == 0:
            self._parts.append(outputs["nll_sum"] / batch.normalizer)

    def mean(self) -> float:
        """Nats per answer token."""
        return float(sum(self._parts))


# ---- transformers.Trainer ---------------------------------------------------------------------


def peer_visits(work: Work, *, repeats: int, checkpointing: bool, rows_at_a_time: int) -> Run:
    """`transformers.Trainer` and PEFT on the same rows in the same steps, padded.

    Args:
        work: What to train on.
        repeats: Visits that are timed, after one that is not.
        checkpointing: Whether activations are recomputed.
        rows_at_a_time: Rows of a forward pass; a step accumulates over them.
    """
    start_measuring()
    model = peer_model(work)
    longest = max(work.lengths)
    rows = peer_rows(Setting(Path(), work.rows, work.batch_size, longest, work.device))
    costs: list[Cost] = []
    first_loss = 0.0
    for visit in range(1 + repeats):
        with tempfile.TemporaryDirectory() as folder:
            trainer = HFTrainer(
                model,
                peer_arguments(
                    work, folder, checkpointing=checkpointing, rows_at_a_time=rows_at_a_time
                ),
                train_dataset=rows,
                data_collator=DataCollatorForSeq2Seq(
                    workload.word_tokenizer(), label_pad_token_id=IGNORED
                ),
            )
            visited = run_peer(trainer)
        if visit == 0:
            first_loss = visited.losses[0]
        else:
            costs.append(visited.cost)
    name = f"transformers.Trainer, {rows_at_a_time} rows at a time"
    name += ", checkpointing" if checkpointing else ""
    found = Run(name, costs, peak_gib(), first_loss)
    print(f"{work.name}, {name}: {found.seconds:.2f} s a visit", flush=True)
    return found


def peer_model(work: Work) -> Any:
    """The same base with the same adapter; PEFT's own layers, transformers' own attention."""
    config = LoraConfig(
        r=LORA["rank"],
        lora_alpha=LORA["alpha"],
        target_modules=LORA["target_modules"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(random_base(work.shape, device=work.device), config).train()


def peer_arguments(
    work: Work, folder: str, *, checkpointing: bool, rows_at_a_time: int
) -> TrainingArguments:
    """Settings that make a visit the same training as fedsafe's."""
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=rows_at_a_time,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=work.batch_size // rows_at_a_time,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        bf16=work.device == "cuda",
        optim="adamw_torch",
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=work.device == "cpu",
    )


# ---- the machine ------------------------------------------------------------------------------


def dtype_on(device: str) -> str:
    """Type of the base's weights."""
    return "bfloat16" if device == "cuda" else "float32"


def start_measuring() -> None:
    """Forget what ran before, and how much memory it took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """The most that was allocated on the GPU since then."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def make_rows(lengths: Sequence[int], *, vocabulary: int) -> datasets.Dataset:
    """Random tokens, the second half of each row is the answer."""
    return workload.random_rows(np.array(lengths, dtype=np.int64), vocabulary=vocabulary)
