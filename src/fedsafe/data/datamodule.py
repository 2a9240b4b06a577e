"""`FederatedDataModule`: from files of conversations to the packed batches of each visit."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from warnings import warn

import datasets
import numpy as np
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from fedsafe.data.augmentation import CaiAugmentation
from fedsafe.data.chat import ensure_chat_template
from fedsafe.data.filtered import FilteredSamples, FilterReport, filter_samples
from fedsafe.data.loaders import EvaluationBatch, evaluation_loader, visits_loader
from fedsafe.data.packing import TrainingBatch
from fedsafe.data.sources import load_samples
from fedsafe.data.splitting import split_over_clients
from fedsafe.data.tokenizer import load_tokenizer, train_tokenizer
from fedsafe.data.tokens import TokenStore, tokenize_samples
from fedsafe.evaluation.benchmark import Benchmark
from fedsafe.evaluation.loading import benchmark_loaders
from fedsafe.federated.agreement import check_agreement
from fedsafe.federated.partition import (
    IID,
    Partition,
    Partitioner,
    PartitionRow,
    partition_rows,
    validation_split,
)
from fedsafe.federated.schedule import RoundPlan, Schedule, Visit
from fedsafe.safety.filter import SafetyFilter
from fedsafe.safety.verdict_targets import VerdictTargets, tokenize_verdicts
from fedsafe.strategies.layout import Layout, layout_of
from fedsafe.types import Sample

GLOBAL_ADAPTER = -1
_DIGEST_DIGITS = 12


class FederatedDataModule(LightningDataModule):
    """Conversations, split over clients, tokenised once and served as packed batches.

    `FederatedRounds` says which visits a round has, by setting `schedule` and `position`.

    Args:
        path: Files (`.jsonl`, `.json`, `.csv`, `.parquet`) or hub names of the conversations;
            `fedsafe test` reads them only for a tokenizer that is trained on them.
        partition: How the samples are split over clients.
        filter: Guard that judges each client's samples before training, and what becomes of the
            unsafe ones; None trains on all.
        cai: What the server trains on between the rounds (`federated.cai`); None is nothing.
        verdict_targets: Trains a guard: each conversation becomes the guard's prompt, answered by
            its `label`. None trains on the conversations themselves.
        tokenizer: Hub name or folder of the tokenizer; None takes the model's own.
        train_tokenizer: Size of the vocabulary of a tokenizer trained on the conversations; None
            trains none.
        batch_size: Samples of one optimizer step.
        max_length: Tokens kept of a sample, from its start.
        validation_share: Share of all samples held out from every client for validation, 0 to below
            1.
        test_path: Files or hub names of test conversations, for `fedsafe test`: loss on them.
        benchmarks: What `fedsafe test` asks the model, and how it scores the replies.
        split: Split of the data sets that are read from the hub.
        on_bad_row: Stop at a bad row, or skip it and list it in `rejected.jsonl` of the run
            directory.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of the partition and of the validation split.
    """

    def __init__(  # noqa: PLR0913
        self,
        path: str | list[str] | None = None,
        partition: Partitioner | None = None,
        filter: SafetyFilter | None = None,
        cai: CaiAugmentation | None = None,
        verdict_targets: VerdictTargets | None = None,
        tokenizer: str | None = None,
        train_tokenizer: int | None = None,
        batch_size: int = 16,
        max_length: int = 512,
        validation_share: float = 0.05,
        test_path: str | list[str] | None = None,
        benchmarks: list[Benchmark] | None = None,
        split: str = "train",
        on_bad_row: Literal["error", "skip"] = "error",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tokenizer is not None and train_tokenizer is not None:
            raise ValueError(
                "give tokenizer or train_tokenizer, not both; "
                f"got {tokenizer!r} and {train_tokenizer}"
            )
        if filter is not None and verdict_targets is not None:
            raise ValueError(
                "give filter or verdict_targets, not both: a guard is trained on unsafe samples too"
            )
        self.path = path
        self.partitioner = partition if partition is not None else IID(num_clients=10)
        self.filter = filter
        self.cai = cai
        self.verdict_targets = verdict_targets
        self.tokenizer_name = tokenizer
        self.train_tokenizer = train_tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.validation_share = validation_share
        self.test_path = test_path
        self.benchmarks = benchmarks or []
        self.split = split
        self.on_bad_row = on_bad_row
        self.num_workers = num_workers
        self.seed = seed
        self.schedule: Schedule | None = None
        self.position = (0, 0)
        """Round, and batches of it that are done; where `train_dataloader` begins."""
        self.validated_clients = [GLOBAL_ADAPTER]
        """Whose adapters to validate; may change between validations, its length may not."""
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._read_samples: tuple[datasets.Dataset, datasets.Dataset] | None = None
        """All samples and their tokens, before the filter."""
        self._store: TokenStore | None = None
        self._partition: Partition | None = None
        self._validation: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._labels: list[str | None] = []
        self._filtered: FilteredSamples | None = None
        self._rejected_name = "rejected.jsonl"

    # ---- what others read ------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a chat template."""
        assert self._tokenizer is not None, "setup has not run yet"
        return self._tokenizer

    @property
    def partition(self) -> Partition:
        """Which training samples belong to which client."""
        assert self._partition is not None, "setup has not run yet"
        return self._partition

    @property
    def store(self) -> TokenStore:
        """All samples, tokenised."""
        assert self._store is not None, "setup has not run yet"
        return self._store

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, the server's own among them."""
        server = self.cai.stores if self.cai is not None else []
        return max([int(self.store.lengths.max()), *(each.longest for each in server)])

    @property
    def largest_id(self) -> int:
        """Largest token id of all samples."""
        server = self.cai.stores if self.cai is not None else []
        return max([self.store.largest_id, *(each.largest_id for each in server)])

    @property
    def num_validation_samples(self) -> int:
        """Samples held out from every client."""
        return len(self._validation)

    def client_rows(self) -> list[PartitionRow]:
        """Samples, tokens and harmful share of each client, for a table."""
        return partition_rows(self.partition, lengths=self.store.lengths, labels=self._labels)

    @property
    def filter_report(self) -> FilterReport | None:
        """What the safety filter did, in numbers; None without one."""
        return self._filtered.report if self._filtered is not None else None

    def write_verdicts(self, folder: Path) -> None:
        """Write the clients' `filter.jsonl` and the counts of it, if there is a filter."""
        if self._filtered is not None:
            self._filtered.write(folder)

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it resumes."""
        rule = type(self.partitioner).__name__
        return {
            "data.samples": self._samples_digest,
            "data.partition": f"{rule} {self._partition_digest}",
            "data.filter": self.filter.identity if self.filter is not None else None,
            "data.validation_share": self.validation_share,
            "data.batch_size": self.batch_size,
            "data.max_length": self.max_length,
            "data.seed": self.seed,
            **(self.cai.identity() if self.cai is not None else {}),
        }

    @cached_property
    def _partition_digest(self) -> str:
        """Short digest of the split; each checkpoint asks for it."""
        return self.partition.digest()[:_DIGEST_DIGITS]

    @cached_property
    def _samples_digest(self) -> str:
        return self.store.digest()

    # ---- Lightning's hooks -----------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Read, check and tokenise on one rank of a machine; the others find it in the cache."""
        self._read_for(self.trainer.state.fn.value)  # type: ignore[union-attr]

    def setup(self, stage: str) -> None:
        """Load the tokens and split them over the clients; for a test the tokenizer alone.

        The filter's guard judges here, on all ranks.
        """
        self._read_for(stage)
        if self._read_samples is not None and self._store is None:
            samples, tokens = self._read_samples
            rule = self.filter.identity if self.filter is not None else None
            seen = {"data.filter": rule, "data.partition": self.partition.digest()}
            check_agreement(self._layout.world, seen)
            if self.filter is not None:
                tokens = self._apply(self.filter, samples, tokens)
            self._labels = tokens["label"]
            self._store = TokenStore(tokens)

    def train_dataloader(self) -> DataLoader[TrainingBatch]:
        """The rest of the current round's batches.

        Raises:
            ValueError: If every client of the round fails.
        """
        if self.schedule is None:
            raise ValueError(
                "there is no schedule of visits; add FederatedRounds to the Trainer's callbacks"
            )
        round_, done = self.position
        plan = self.schedule.plan(round_)
        if plan.num_client_batches == 0 and round_ < self.schedule.num_rounds:
            names = ", ".join(self.schedule.partition.names[v.client] for v in plan.visits)
            raise ValueError(
                f"every client of round {round_ + 1} fails ({names}), there would be no update; "
                "resume, or start afresh, with a lower failure_probability"
            )
        return visits_loader(self.store, plan, done=done, num_workers=self.num_workers)

    def client_dataloader(self, visit: Visit) -> DataLoader[TrainingBatch]:
        """The batches of one visit alone, for a client of a real federation."""
        assert self.schedule is not None, "a client needs the schedule of the federation"
        plan = RoundPlan(self.schedule, visit.round, [visit])
        return visits_loader(self.store, plan, done=0, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[EvaluationBatch] | list[Any]:
        """The held-out samples, in packs; once for each adapter to validate."""
        if not len(self._validation):
            return []
        everyone = self._layout.world
        return evaluation_loader(self.store, self._validation, self.validated_clients, everyone)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The test samples in packs, and the items of each benchmark.

        Raises:
            ValueError: If there are neither, or two benchmarks share a name.
        """
        if self.test_path is None and not self.benchmarks:
            raise ValueError(
                "there is nothing to test on; give data.benchmarks, or conversations with "
                "--data.test_path"
            )
        loaders: list[DataLoader[Any]] = []
        if self.test_path is not None:
            tokens = self._tokenize(self._read(self.test_path))
            store, every = TokenStore(tokens), np.arange(len(tokens))
            everyone = self._layout.world
            loaders.append(evaluation_loader(store, every, [GLOBAL_ADAPTER], everyone))
        return loaders + benchmark_loaders(self.benchmarks, self._layout.replicas)

    # ---- steps -----------------------------------------------------------------------------------

    @property
    def _layout(self) -> Layout:
        return layout_of(self.trainer.strategy) if self.trainer is not None else Layout()

    def _read_for(self, stage: str) -> None:
        """Read what a stage needs, once."""
        if stage != "test":
            self._load()
        elif self._tokenizer is None:
            self._rejected_name = "rejected-test.jsonl"
            self._forget_rejected()
            texts = self._read(self._path()) if self.train_tokenizer is not None else []
            self._tokenizer = self._make_tokenizer(_texts(texts))

    def _load(self) -> None:
        if self._read_samples is not None:
            return
        self._check_tokenizer()
        rejected = self._forget_rejected()
        samples = self._read(self._path())
        self._tokenizer = self._make_tokenizer(_texts(samples))
        if self.cai is not None:
            self.cai.load(self.tokenizer, rejected=rejected)
        tokens = self._tokenize(samples)
        train, self._validation = validation_split(
            len(tokens), share=self.validation_share, seed=self.seed
        )
        self._partition = split_over_clients(tokens, train, self.partitioner, seed=self.seed)
        self._read_samples = samples, tokens

    def _path(self) -> str | list[str]:
        if self.path is None:
            raise ValueError("there are no conversations to train on; give --data.path")
        return self.path

    def _read(self, path: str | list[str]) -> datasets.Dataset:
        return load_samples(
            path, split=self.split, on_bad_row=self.on_bad_row, rejected=self._rejected_file()
        )

    def _tokenize(self, samples: datasets.Dataset) -> datasets.Dataset:
        settings: Any = {
            "max_length": self.max_length,
            "on_bad_row": self.on_bad_row,
            "rejected": self._rejected_file(),
        }
        if self.verdict_targets is not None:
            return tokenize_verdicts(samples, self.verdict_targets, self.tokenizer, **settings)
        return tokenize_samples(samples, self.tokenizer, **settings)

    def _apply(
        self, rule: SafetyFilter, samples: datasets.Dataset, tokens: datasets.Dataset
    ) -> datasets.Dataset:
        """Let the filter change who trains on what; the tokens with those of repaired samples."""
        filtered = filter_samples(
            rule,
            samples=samples,
            tokens=tokens,
            partition=self.partition,
            validation=self._validation,
            tokenize=self._tokenize,
            seed=self.seed,
            on_bad_row=self.on_bad_row,
            rejected=self._rejected_file(),
            peers=self._layout.world,  # before the base is loaded each rank has room for a guard
        )
        if len(self._validation) and not len(filtered.validation):
            warn("the safety filter leaves no sample for validation", stacklevel=2)
        rule.guard.release()  # its weights are not needed beside the model's
        self._partition, self._validation = filtered.partition, filtered.validation
        self._filtered = filtered
        return filtered.tokens

    def _check_tokenizer(self) -> None:
        if self.train_tokenizer is None or self.trainer is None:
            return
        if self.trainer.lightning_module.hparams.get("from_config") is None:
            raise ValueError(
                f"train_tokenizer is {self.train_tokenizer}; it makes a new vocabulary, which a "
                "trained base does not know; leave it out"
            )

    def _make_tokenizer(self, texts: Iterator[str]) -> PreTrainedTokenizerBase:
        if self.train_tokenizer is not None:
            tokenizer: PreTrainedTokenizerBase = train_tokenizer(
                texts, vocab_size=self.train_tokenizer
            )
        else:
            tokenizer = load_tokenizer(self.tokenizer_name or self._base_name())
        ensure_chat_template(tokenizer)
        return tokenizer

    def _base_name(self) -> str:
        if self.trainer is None:
            raise ValueError(
                "there is no model to take the tokenizer from; give tokenizer or train_tokenizer"
            )
        return str(self.trainer.lightning_module.hparams["base"])

    def _rejected_file(self) -> Path | None:
        """Where to list rejected samples: in the run directory, by one process."""
        if self.trainer is None or not self.trainer.is_global_zero:
            return None
        return Path(self.trainer.default_root_dir) / self._rejected_name

    def _forget_rejected(self) -> Path | None:
        """Remove what an earlier run rejected; returns the file."""
        file = self._rejected_file()
        if file is not None:
            file.unlink(missing_ok=True)
        return file


def _texts(samples: Iterable[Sample]) -> Iterator[str]:
    return (turn["content"] for row in samples for turn in row["messages"])
