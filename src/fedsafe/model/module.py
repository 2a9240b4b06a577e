"""`LoraLM`: a frozen causal language model with a LoRA adapter, as a LightningModule."""

from collections import UserList
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import Strategy
from peft import PeftModel
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from fedsafe.data.packing import Pack, PreferenceBatch, SupervisedBatch, TrainingBatch
from fedsafe.evaluation.benchmark import Respondent
from fedsafe.evaluation.loading import BenchmarkBatch
from fedsafe.evaluation.result_files import Subject
from fedsafe.evaluation.scores import BenchmarkScores
from fedsafe.federated.schedule import Stream, derive_seed
from fedsafe.model import attention as packed
from fedsafe.model.adapter import adapter_scale, load_adapter
from fedsafe.model.compilation import compile_layers
from fedsafe.model.flat_adapter import FlatAdapter, WholeAdapter
from fedsafe.model.identity import refuse_difference
from fedsafe.model.learning_rate import (
    LearningRateSchedule,
    check_schedule,
    learning_rate_factor,
)
from fedsafe.model.lora import add_lora, load_base
from fedsafe.model.objectives import (
    frozen_head_nll,
    nll,
    preference_step,
    sft_loss,
    sums_per_sample,
)
from fedsafe.model.probes import check_isolation, head_is_plain
from fedsafe.strategies import layout


class LoraLM(LightningModule):
    """A causal language model: a frozen base and a LoRA adapter, trained on packed samples.

    The base is built once, in `configure_model`; checkpoints hold the adapter alone.

    Args:
        base: Hub name or local folder of a causal language model; with `from_config`, a model type
            such as `llama` or `gpt2`.
        from_config: Configuration values of the model type; builds a random base instead of loading
            one.
        rank: Rank of the LoRA adapter, 1 or more.
        alpha: Scale of the LoRA adapter; its update is multiplied by alpha / rank.
        lora_dropout: Dropout on the adapter's input, 0 to below 1.
        target_modules: Names of the linear modules or embeddings that get an adapter, or
            `all-linear`.
        dtype: Type of the frozen weights; the adapter is always kept and averaged in float32.
        quantize_4bit: Load the base in 4 bits (needs a CUDA device and the extra `quantization`).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a
            third slower.
        compile: Compile the parts of each layer with torch.compile: faster on a GPU after a minute
            at the start, in which each is compiled.
        attention: `packed` attends within each sample of a pack; any other name is one of
            transformers' implementations, for models that need it (`eager`, `sdpa`,
            `flash_attention_2`, `flex_attention`).
        optimizer: Local optimizer, fresh at each visit.
        learning_rate: Peak learning rate of a visit, above 0.
        weight_decay: Decoupled weight decay (AdamW) or L2 penalty (SGD) on the adapter.
        lr_schedule: Learning rate over rounds; within a visit it is constant but for its warm-up.
        lr_floor: Share of the peak that the cosine schedule decays to, 0 to 1.
        warmup_rounds: Rounds over which the learning rate rises to its peak.
        warmup_steps: Steps at the start of each visit over which the learning rate rises.
        seed: Seed of the adapter's initial values, of a random base and of dropout.
    """

    def __init__(  # noqa: PLR0913
        self,
        base: str,
        from_config: dict[str, Any] | None = None,
        rank: int = 16,
        alpha: float = 32.0,
        lora_dropout: float = 0.0,
        target_modules: list[str] | str = "all-linear",
        dtype: Literal["float32", "bfloat16"] = "float32",
        quantize_4bit: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        attention: str = "packed",
        optimizer: Literal["adamw", "sgd"] = "adamw",
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        lr_schedule: LearningRateSchedule = "constant",
        lr_floor: float = 0.0,
        warmup_rounds: int = 0,
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_schedule(
            learning_rate, lr_floor=lr_floor, warmup_rounds=warmup_rounds, warmup_steps=warmup_steps
        )
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is {lora_dropout}; give 0 to below 1")
        self.save_hyperparameters(logger=False)
        self.strict_loading = False  # checkpoints hold the adapter, not the base
        self.model: PeftModel | None = None
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()
        self.benchmark_scores: dict[str, BenchmarkScores] = {}
        self.subject: Subject = "test"
        """What is tested: `test`, the adapter, or `base`, the model without it."""
        self.adapter_folder: Path | None = None
        """Adapter to test; None is the one that the model has."""
        self._head_is_plain: bool | None = None

    def configure_model(self) -> None:
        """Build the frozen base and the adapter, once, as the strategy keeps them."""
        if self.model is not None:
            return
        self.model = layout.built_under(self._strategy, self._make_model)
        if self.hparams["compile"]:  # once it is built, as a strategy may send it to other ranks
            compile_layers(self.model)

    def _make_model(self) -> PeftModel:
        hp: Any = self.hparams
        model = add_lora(
            self.make_base(),
            rank=hp.rank,
            alpha=hp.alpha,
            dropout=hp.lora_dropout,
            target_modules=hp.target_modules,
            seed=hp.seed,
        )
        if hp.gradient_checkpointing:
            base: Any = model.get_base_model()
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.disable_input_require_grads()  # the way of checkpointing that needs none
        model.train()
        return model

    def make_base(self) -> PreTrainedModel:
        """A new copy of the frozen base; with `from_config`, the same random weights each time."""
        hp: Any = self.hparams
        drawn = torch.device("cpu") if hp.from_config is not None else nullcontext()
        with drawn:  # a GPU would draw other weights
            return load_base(
                hp.base,
                from_config=hp.from_config,
                dtype=getattr(torch, hp.dtype),
                quantize_4bit=hp.quantize_4bit,
                attention=packed.PACKED if hp.attention == "packed" else hp.attention,
                seed=hp.seed,
            )

    @property
    def peft_model(self) -> PeftModel:
        """The base with its adapter; exists once `configure_model` has run."""
        assert self.model is not None, "configure_model has not run yet"
        return self.model

    def flat_adapter(self) -> FlatAdapter:
        """The adapter as one vector, under the strategy of the Trainer if there is one."""
        return layout.flat_adapter_under(self._strategy, self.peft_model.named_parameters())

    @property
    def _strategy(self) -> Strategy | None:
        return self._trainer.strategy if self._trainer is not None else None

    def check_data(self, *, vocab_size: int, longest: int, largest_id: int = 0) -> None:
        """Refuse samples that the base cannot read, before one of them fails deep inside it.

        Args:
            vocab_size: Tokens that the tokenizer knows.
            longest: Tokens of the longest sample.
            largest_id: Largest token id in the samples.

        Raises:
            ValueError: If the base has too few embeddings or too few positions.
        """
        base: Any = self.peft_model.get_base_model()
        embeddings = base.get_input_embeddings()
        embeddings = getattr(embeddings, "base_layer", embeddings)  # with an adapter on it
        num_embeddings = embeddings.num_embeddings
        # a trained base may lack rows for tokens that were added later and are not in the samples
        if self.hparams["from_config"] is not None and vocab_size > num_embeddings:
            raise ValueError(
                f"the tokenizer has {vocab_size} tokens, the base {num_embeddings}; "
                f"set vocab_size in from_config to {vocab_size} or more"
            )
        if largest_id >= num_embeddings:
            raise ValueError(
                f"a sample has token id {largest_id}, the base has {num_embeddings} embeddings; "
                "leave data.tokenizer and data.train_tokenizer out to take the base's own tokenizer"
            )
        num_positions = getattr(base.config, "max_position_embeddings", None)
        if num_positions is not None and longest > num_positions:
            raise ValueError(
                f"the longest sample has {longest} tokens, the base has {num_positions} positions; "
                "lower max_length of the data"
            )

    def forward(self, batch: Pack) -> Tensor:
        """Negative log-likelihood of each answer token of a pack, nats, shape ``(N,)``, float32.

        The output layer is computed only where there is a loss.
        """
        if self._head_is_plain is None:
            self._head_is_plain = self._probe()
        inputs = self._inputs(batch)
        if not self._head_is_plain:
            logits = self.peft_model(**inputs, logits_to_keep=batch.predictors).logits[0]
            return nll(logits, batch.targets)
        base: Any = self.peft_model.get_base_model()

        def nll_of_hidden() -> Tensor:
            hidden = base.base_model(**inputs).last_hidden_state[0, batch.predictors]
            head = base.get_output_embeddings()
            with layout.whole_under(self._strategy, head):
                return frozen_head_nll(hidden, head.weight, batch.targets)

        return layout.called_inside(self._strategy, base, nll_of_hidden)

    def training_step(
        self, batch: SupervisedBatch | PreferenceBatch, batch_idx: int
    ) -> dict[str, Tensor]:
        """This batch's part of the optimizer step's loss.

        Returns:
            `loss`; `nll_sum`, the sum over the answer tokens, for preferences over those of the
            chosen answers; and for preferences `num_preferred`, the pairs of which the better
            answer became likelier, against the worse one, than the reference has it.
        """
        nll_per_token = self.forward(batch)  # not self(batch): hooks count calls as steps
        if isinstance(batch, PreferenceBatch):
            return preference_step(nll_per_token, batch)
        loss = sft_loss(nll_per_token, normalizer=batch.normalizer)
        if isinstance(batch, TrainingBatch):
            # gradients are averaged over accumulated batches and ranks; the normalizer counts all
            loss = loss * batch.key.num_parts
        return {"loss": loss, "nll_sum": nll_per_token.detach().sum()}

    @torch.no_grad()
    def answer_logprobs(self, batch: Pack) -> Tensor:
        """Log-probability of each sample's answer, summed over its tokens, without dropout.

        Returns:
            Nats, shape ``(num_samples,)``, float32.
        """
        with self._evaluating():
            return -sums_per_sample(self(batch), batch.target_counts)

    def validation_step(self, batch: Pack, batch_idx: int) -> None:
        """Log the loss per answer token over the validation samples."""
        self._evaluate(batch, self.val_loss, "val/loss")

    def on_test_start(self) -> None:
        """Forget what was measured before; take the adapter that is to be tested."""
        self.benchmark_scores.clear()
        if self.adapter_folder is not None:
            load_adapter(self.peft_model, self.adapter_folder, access=self.flat_adapter())

    def test_step(
        self, batch: Pack | BenchmarkBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any] | None:
        """Log the loss per answer token over the test samples, or ask items of a benchmark.

        Returns:
            Of a benchmark: `benchmark`, its name, and `records`, those of all replicas' items.
        """
        with adapter_scale(self.peft_model, 0 if self.subject == "base" else 1):
            if isinstance(batch, Pack):
                self._evaluate(batch, self.test_loss, f"{self.subject}/loss")
                return None
            benchmark = batch.benchmark
            asked = benchmark.ask(self.respondent(), batch.places) if batch.places else []
        records = layout.layout_of(self.trainer.strategy).replicas.gather_lists(asked)
        if benchmark.name not in self.benchmark_scores:
            scores = BenchmarkScores(benchmark.measures, benchmark.categories)
            self.benchmark_scores[benchmark.name] = scores.to(self.device)
        self.benchmark_scores[benchmark.name].update(records)
        return {"benchmark": benchmark.name, "records": records}

    def on_test_epoch_end(self) -> None:
        """Log the measures of every benchmark."""
        for name, scores in self.benchmark_scores.items():
            measures = scores.compute().items()
            self.log_dict({f"{self.subject}/{name}/{each}": value for each, value in measures})

    def respondent(self) -> Respondent:
        """The model as benchmarks see it."""
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        replica = layout.layout_of(self.trainer.strategy).replica
        return Respondent(self.peft_model, tokenizer, self.answer_logprobs, replica)

    def _evaluate(self, batch: Pack, metric: MeanMetric, name: str) -> None:
        nll_per_token = self(batch)
        if len(nll_per_token):
            metric.update(nll_per_token)
        self.log(
            name,
            metric,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=1,
            add_dataloader_idx=False,
        )

    def on_train_batch_start(self, batch: TrainingBatch, batch_idx: int) -> None:
        """Set the learning rate and the seed of dropout, both from the batch's place in the run."""
        key = batch.key
        rate = 0.0  # a batch that only stands for something changes nothing itself
        if not key.is_server_visit and not key.is_idle:
            rate = self.learning_rate_at(round_=key.round, num_rounds=key.num_rounds, step=key.step)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate
        seed = derive_seed(
            Stream.DROPOUT, self.hparams["seed"], key.round, key.client, key.step, key.part
        )
        # torch.manual_seed seeds every kind of device there might be, at half a millisecond a call
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def learning_rate_at(self, *, round_: int, num_rounds: int, step: int) -> float:
        """Learning rate of one optimizer step; see `learning_rate.learning_rate_factor`."""
        hp: Any = self.hparams
        factor = learning_rate_factor(
            round_=round_,
            num_rounds=num_rounds,
            step=step,
            schedule=hp.lr_schedule,
            floor=hp.lr_floor,
            warmup_rounds=hp.warmup_rounds,
            warmup_steps=hp.warmup_steps,
        )
        return float(hp.learning_rate * factor)

    def configure_optimizers(self) -> Optimizer:
        """The local optimizer over the adapter; rounds reset its state at each visit."""
        hp: Any = self.hparams
        parameters: Iterable[Tensor] = WholeAdapter(self.peft_model.named_parameters()).parameters
        if hp.optimizer == "sgd":
            return SGD(parameters, lr=hp.learning_rate, weight_decay=hp.weight_decay)
        return AdamW(parameters, lr=hp.learning_rate, weight_decay=hp.weight_decay)

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it resumes."""
        names = "base from_config rank alpha target_modules dtype optimizer seed"
        return {f"model.{name}": self.hparams[name] for name in names.split()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the base out: it is frozen.

        `FederatedRounds` keeps the adapter and what the optimizer remembers, in one form for all
        strategies and numbers of ranks.
        """
        checkpoint["state_dict"] = {}
        checkpoint["optimizer_states"] = []
        checkpoint["fedsafe_model"] = self.identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or another adapter."""
        refuse_difference(checkpoint.get("fedsafe_model", {}), self.identity())

    def _inputs(self, batch: Pack) -> dict[str, Any]:
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        if self.hparams["attention"] == "packed":
            # the compiler looks inside a list, and would compile anew for each one
            inputs["segment_lengths"] = UserList(batch.segment_lengths)
        return inputs

    def _probe(self) -> bool:
        """Whether the output layer is a plain product; refuses a model that mixes samples."""
        base = self.peft_model.get_base_model()
        with self._evaluating():  # dropout would make two passes differ
            layout.called_inside(self._strategy, base, partial(check_isolation, base, self._inputs))
            return layout.called_inside(
                self._strategy, base, partial(head_is_plain, base, self._inputs)
            )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.peft_model.training
        self.peft_model.eval()
        try:
            yield
        finally:
            self.peft_model.train(was_training)
