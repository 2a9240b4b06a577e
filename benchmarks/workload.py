"""The models, rows and measurements that the benchmarks share."""

import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is downloaded
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
warnings.filterwarnings("ignore")

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from lightning import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.strategies import Strategy  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from fedsafe.data.datamodule import FederatedDataModule  # noqa: E402
from fedsafe.data.tokens import TokenStore  # noqa: E402
from fedsafe.federated.partition import IID, Partition, SampleColumns  # noqa: E402
from fedsafe.federated.rounds import FederatedRounds  # noqa: E402
from fedsafe.model.lora import load_base  # noqa: E402
from fedsafe.model.module import LoraLM  # noqa: E402

RESERVED_TOKENS = 4
"""Token ids below this are special: padding, begin, end, unknown."""


def be_quiet() -> None:
    """Keep everything but the benchmark's own output off the screen."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("lightning.pytorch", "lightning.fabric", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---- models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A Llama shape; with as many key/value heads as heads unless told otherwise."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None

    def config(self) -> dict[str, Any]:
        """The values of transformers' `LlamaConfig`."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads or self.heads,
            "vocab_size": self.vocabulary,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


TINY = Shape(hidden=32, intermediate=64, layers=2, heads=2, vocabulary=128)
SMALL = Shape(hidden=256, intermediate=688, layers=4, heads=4, vocabulary=8000)
"""7 million parameters, output layer and embeddings included."""
LARGE = Shape(hidden=512, intermediate=1408, layers=8, heads=8, vocabulary=32000)
"""26 million parameters without embeddings."""

LORA: dict[str, Any] = {"rank": 16, "alpha": 32.0, "target_modules": ["q_proj", "v_proj"]}
LEARNING_RATE = 1e-4


def save_base(shape: Shape, folder: Path) -> Path:
    """Write a random base model, which every side then loads as a user would."""
    model = load_base("llama", from_config=shape.config(), seed=0)
    model.save_pretrained(folder)
    return folder


def lora_lm(base: Path, *, dtype: str = "float32") -> LoraLM:
    """Fedsafe's model on a saved base, built."""
    module = LoraLM(str(base), dtype=dtype, learning_rate=LEARNING_RATE, **LORA)  # type: ignore[arg-type]
    module.configure_model()
    return module


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of four special tokens; the rows are tokens already, so it has nothing to do."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(special, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


# ---- rows -------------------------------------------------------------------------------------


def random_rows(lengths: NDArray[np.int64], *, vocabulary: int, seed: int = 0) -> datasets.Dataset:
    """Rows of random tokens, the second half of each is the answer.

    The Arrow table is built at once, so a million rows take a second.

    Args:
        lengths: Tokens of each row, >= 2, shape ``(num_rows,)``.
        vocabulary: Number of token ids.
        seed: Seed of the tokens.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rng = np.random.default_rng(seed)
    ids = rng.integers(RESERVED_TOKENS, vocabulary, offsets[-1], dtype=np.int32)
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    answers = positions >= np.repeat(lengths - lengths // 2, lengths)
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, ids),
        "answer_mask": pa.ListArray.from_arrays(offsets, answers.astype(np.uint8)),
    }
    return datasets.Dataset(pa.table(columns))


def conversation_lengths(num_rows: int, *, longest: int = 512) -> NDArray[np.int64]:
    """Log-normal lengths, median about 120 tokens, as of instruction data; always the same."""
    rng = np.random.default_rng(0)
    lengths = [
        min(longest, max(min(24, longest), int(rng.lognormal(4.8, 0.8)))) for _ in range(num_rows)
    ]
    return np.array(lengths, dtype=np.int64)


class TokenRows(FederatedDataModule):
    """A data module whose samples are tokens already.

    Args:
        rows: As `random_rows` returns them.
        num_clients: Clients that the rows are dealt to.
        batch_size: Samples of one optimizer step.
    """

    def __init__(self, rows: datasets.Dataset, *, num_clients: int, batch_size: int) -> None:
        super().__init__(path="(random tokens)", batch_size=batch_size, validation_share=0.0)
        self._read_samples = rows, rows  # there is nothing to read
        self._store = TokenStore(rows)
        self._tokenizer = word_tokenizer()
        self._partition = deal(len(rows), num_clients=num_clients)
        self._labels = []


def deal(num_samples: int, *, num_clients: int) -> Partition:
    """Samples dealt out evenly."""
    return IID(num_clients)(SampleColumns(num_samples), seed=0)


# ---- running and measuring --------------------------------------------------------------------


class Cost(NamedTuple):
    """What a piece of work took."""

    wall_seconds: float
    cpu_seconds: float

    def __sub__(self, other: "Cost") -> "Cost":
        """What was added since `other`."""
        return Cost(self.wall_seconds - other.wall_seconds, self.cpu_seconds - other.cpu_seconds)

    def __truediv__(self, number: float) -> "Cost":
        """The share of one of `number` equal pieces."""
        return Cost(self.wall_seconds / number, self.cpu_seconds / number)


def median(costs: Sequence[Cost]) -> Cost:
    """Medians of wall and CPU time, apart."""
    return Cost(*(statistics.median(column) for column in zip(*costs, strict=True)))


class Stopwatch:
    """Wall and CPU time of this process since `start`, all threads counted."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Cost:
        """Time since the start; waits for the accelerator if there is one."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Cost(time.perf_counter() - self._wall, time.process_time() - self._cpu)


class RoundClock(Callback):
    """When each round of a fit began and ended; put it after `FederatedRounds`.

    A round runs from the loading of its first batch until its files are written.
    """

    def __init__(self) -> None:
        self.starts: list[Cost] = []
        self.ends: list[Cost] = []
        self._watch = Stopwatch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A round begins."""
        self.starts.append(self._watch.read())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Its files are written."""
        self.ends.append(self._watch.read())

    def cost(self, round_: int) -> Cost:
        """Cost of one round, from 0."""
        return self.ends[round_] - self.starts[round_]

    def cost_after(self, warm_up: int) -> Cost:
        """Cost of everything from the end of round `warm_up` (from 1) to the end of the last."""
        return self.ends[-1] - self.ends[warm_up - 1]


def fit(  # noqa: PLR0913
    module: LoraLM,
    data: FederatedDataModule,
    rounds: FederatedRounds,
    *,
    num_rounds: int,
    run_dir: Path,
    callbacks: Sequence[Callback] = (),
    device: str = "cpu",
    accumulate: int = 1,
    strategy: Strategy | str = "auto",
) -> None:
    """A federated run as a user starts it, without loggers, checkpoints and progress bar."""
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        default_root_dir=run_dir,
        max_epochs=num_rounds,
        callbacks=[rounds, *callbacks],
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def print_json(figures: dict[str, Any]) -> None:
    """The benchmark's last line."""
    print(json.dumps(figures), flush=True)
