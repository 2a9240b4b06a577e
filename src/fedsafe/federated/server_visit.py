"""The server visit: the global model revises its own red responses and is trained on the result.

    if adaptive and the model refuses enough:  nothing to do
    pairs = red responses and their revisions        (kept from an earlier time, or made now)
    SFT on the revised ones; DPO, revised against red; each mixed with helpful answers

Everything that is random derives from (seed, round, step), and the visit can be put away and taken
up again between any two steps. Several ranks do it together: each replica speaks in its share of
the conversations, each rank trains on its part of every step.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from warnings import warn

import numpy as np
import torch
from lightning import Trainer
from numpy.typing import NDArray
from torch import Tensor

from fedsafe.data.augmentation import CaiAugmentation
from fedsafe.data.packing import Pack, PreferenceBatch, SupervisedBatch, pack
from fedsafe.data.preferences import PreferenceStore
from fedsafe.federated.constitutional_training import ConstitutionalTraining, Mixture, Objective
from fedsafe.federated.schedule import Stream, derive_seed, random_stream
from fedsafe.federated.server_listener import ServerVisitListener
from fedsafe.federated.server_steps import ServerSteps
from fedsafe.model.module import LoraLM
from fedsafe.safety.model_speaker import ModelSpeaker
from fedsafe.safety.transcripts import RevisionCounts
from fedsafe.strategies.layout import layout_of

_STATE = (
    "record",
    "tokens",
    "seconds",
    "phase",
    "step",
    "num_steps",
    "losses",
    "num_preferred",
    "num_compared",
    "reference",
)


class _Phase(NamedTuple):
    mixture: Mixture
    num_steps: int


class ServerVisit:
    """One visit under way.

    Args:
        rules: The settings.
        data: Prompts, pairs and helpful answers.
        trainer: Its strategy and first optimizer take the steps.
        module: The model; its adapter is trained from where it is.
        round_: Round, from 0.
        seed: Seed of every draw.
    """

    def __init__(
        self,
        rules: ConstitutionalTraining,
        data: CaiAugmentation,
        *,
        trainer: Trainer,
        module: LoraLM,
        round_: int,
        seed: int,
    ) -> None:
        self._rules = rules
        self._data = data
        self._trainer = trainer
        self._module = module
        self._round = round_
        self._seed = seed
        self._layout = layout_of(trainer.strategy)
        self._steps = ServerSteps(trainer, module)
        self._speaker = ModelSpeaker(module.peft_model, data.tokenizer)
        self._record: dict[str, Any] = {"regime": rules.regime}
        self._tokens = {"generated": 0, "read": 0, "trained": 0}
        self._seconds = {"revising": 0.0, "training": 0.0}
        self._goes_on = False
        self._enough = False
        self._phase = self._step = 0
        self._num_steps = {"sft": 0, "dpo": 0}
        self._losses: dict[str, list[float]] = {"sft": [], "dpo": []}
        self._num_preferred = self._num_compared = 0
        self._reference: Tensor | None = None

    # ---- the visit -------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train the module's adapter.

        Returns:
            What was done and what it cost, for the round's record.

        Raises:
            NonFiniteLossError: If a loss, or the adapter after a step, is not finite.
        """
        if not self._goes_on:
            self._enough = self._refuses_enough("refusal_rate_before")
        if not self._enough:
            store = self._pairs()
            self._record |= {"samples": len(store), "pairs": int(store.comparable.sum())}
            if len(store):
                self._train(store + self._data.helpful)
        return self._finished_record()

    def _train(self, store: PreferenceStore) -> None:
        phases = self._phases(store)
        while self._phase < len(phases) and not self._enough:
            mixture, num_steps = phases[self._phase]
            if self._step == 0:
                self._begin_phase(store, mixture, num_steps)
            while self._step < num_steps and not self._enough:
                with self._timed("training"):
                    self._take_step(store, mixture, num_steps)
                left = num_steps - self._step + sum(n for _, n in phases[self._phase + 1 :])
                self._after_step(f"{mixture.objective} {self._step}/{num_steps}", is_last=not left)
            self._phase, self._step = self._phase + 1, 0

    def _after_step(self, doing: str, *, is_last: bool) -> None:
        done = sum(self._num_steps.values())
        if is_last or done % self._rules.probe_every == 0:
            self._enough = self._refuses_enough("refusal_rate_after")
        self._tell(doing)
        if not is_last and not self._enough:
            for listener in self._listeners():
                listener.on_server_step(self._trainer, done)

    # ---- red responses and revisions -------------------------------------------------------------

    def _refuses_enough(self, name: str) -> bool:
        """Ask the held-out prompts, in the adaptive regime."""
        if not self._rules.num_held_out:
            return False
        held_out = self._split()[1]
        self._tell(f"asking {len(held_out)} held-out prompts")
        prompts = [self._data.prompts[place] for place in held_out.tolist()]
        seed = derive_seed(Stream.PROBE, self._seed, self._round, sum(self._num_steps.values()))
        with self._speaking():
            found = self._data.reviser.refusal_rate(
                self._speaker, prompts, seed=seed, replicas=self._layout.replicas
            )
        rate, generated, read = self._layout.world.from_first(lambda: found)  # all go on, or none
        self._tokens["generated"] += generated
        self._tokens["read"] += read
        self._record[name] = rate
        return bool(rate >= self._rules.refusal_floor)

    def _pairs(self) -> PreferenceStore:
        """The pairs to train on: those that are there, or new ones of the model as it is."""
        if self._data.ready is not None:
            return self._data.ready
        if self._goes_on:
            return self._data.read_back(self._file, layout=self._layout)
        helpful_per_step = self._data.helpful_per_step(len(self._data.helpful))
        wanted = self._rules.num_prompts(self._data.batch_size - helpful_per_step)
        asked = random_stream(Stream.RED_TEAM, self._seed, self._round)
        places = sorted(asked.permutation(self._split()[0])[:wanted].tolist())
        with self._speaking():
            counts, store = self._data.revise(
                self._speaker,
                places,
                seed=derive_seed(Stream.REVISION, self._seed, self._round),
                file=self._file,
                on_progress=lambda done, total: self._tell(f"revising {done}/{total}"),
                layout=self._layout,
            )
        record = counts.as_dict()
        self._tokens["generated"] += record.pop("tokens_generated")
        self._tokens["read"] += record.pop("tokens_read")
        self._record |= record
        warn_of_nothing(counts, store, when=f"round {self._round + 1}")
        return store

    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._data.split_prompts(self._rules.num_held_out, seed=self._seed)

    @property
    def _file(self) -> Path:
        return pairs_file(Path(self._trainer.default_root_dir), self._round)

    # ---- training --------------------------------------------------------------------------------

    def _phases(self, store: PreferenceStore) -> list[_Phase]:
        """SFT on all answers, DPO on those with a worse one beside them."""
        is_helpful = np.arange(len(store)) >= len(store) - len(self._data.helpful)
        usable_for: dict[Objective, NDArray[np.bool_]] = {
            "sft": np.ones(len(store), np.bool_),
            "dpo": store.comparable,
        }
        mixtures = []
        for objective, usable in usable_for.items():
            helpful = np.flatnonzero(usable & is_helpful)
            share = self._data.helpful_per_step(len(helpful))
            revised = np.flatnonzero(usable & ~is_helpful)
            mixtures.append(
                Mixture(objective, revised, helpful, self._data.batch_size - share, share)
            )
        return [_Phase(mixture, self._rules.num_steps(mixture)) for mixture in mixtures]

    def _begin_phase(self, store: PreferenceStore, mixture: Mixture, num_steps: int) -> None:
        """A fresh optimizer; for preferences, the reference: the adapter as it is now."""
        self._steps.begin()
        if mixture.objective == "sft" or num_steps == 0:
            return
        self._tell("reference")
        with self._timed("training"):
            steps = (self._samples(mixture, step) for step in range(num_steps))
            used = np.unique(np.concatenate(list(steps))).tolist()
            self._reference = torch.zeros(len(store), 2)
            world, packs = self._layout.world, list(store.both_answers(used))
            packs += [([], pack([]))] * (-len(packs) % world.size)  # all ranks in lock-step
            for places, logprobs in world.in_turns(packs, self._logprobs):
                self._reference[places] = logprobs
            self._tokens["read"] += store.num_tokens(used, both=True)

    def _logprobs(self, some: tuple[list[int], Pack]) -> tuple[list[int], Tensor]:
        """Log-probabilities of both answers of some pairs, shape ``(len(places), 2)``."""
        places, packed = some
        with self._trainer.precision_plugin.forward_context():  # as the steps
            logprobs = self._module.answer_logprobs(packed.to(self._module.device))
        return places, logprobs[: 2 * len(places)].view(-1, 2).cpu()

    def _samples(self, mixture: Mixture, step: int) -> NDArray[np.int64]:
        return mixture.samples_of(step, seed=self._seed, round_=self._round)

    def _take_step(self, store: PreferenceStore, mixture: Mixture, num_steps: int) -> None:
        rules, objective = self._rules, mixture.objective
        samples = self._samples(mixture, self._step).tolist()
        share: Any = {
            "num_parts": self._trainer.accumulate_grad_batches,
            "peers": self._layout.world,
        }
        batches: Sequence[SupervisedBatch | PreferenceBatch]
        if objective == "sft":
            batches = store.supervised(samples, **share)
        else:
            assert self._reference is not None
            batches = store.preference(
                samples,
                reference=self._reference,
                beta=rules.beta,
                nll_weight=rules.nll_weight,
                **share,
            )
        self._seed_dropout(objective)
        taken = self._steps.take(
            batches,
            rate=rules.learning_rate(objective, self._step, num_steps),
            name=f"step {self._step + 1} of the server's {objective} in round {self._round + 1}",
            samples=store.named(samples),
        )
        self._losses[objective].append(taken.loss)
        self._num_preferred += taken.num_preferred
        self._tokens["trained"] += store.num_tokens(samples, both=objective == "dpo")
        self._step += 1
        self._num_steps[objective] += 1
        self._num_compared += len(samples) if objective == "dpo" else 0

    def _seed_dropout(self, objective: str) -> None:
        key = (self._seed, self._round, ("sft", "dpo").index(objective), self._step)
        world = self._layout.world  # each rank has another part
        seed = derive_seed(Stream.SERVER_DROPOUT, *key, *([world.index] if world.size > 1 else []))
        torch.default_generator.manual_seed(seed)
        if self._module.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    # ---- the record ------------------------------------------------------------------------------

    def _finished_record(self) -> dict[str, Any]:
        record = self._record | {f"{name}_steps": n for name, n in self._num_steps.items()}
        for name, losses in self._losses.items():
            record[f"{name}_loss"] = sum(losses) / len(losses) if losses else None
        if self._num_compared:
            record["preferred"] = self._num_preferred / self._num_compared
        record |= {f"tokens_{name}": count for name, count in self._tokens.items()}
        record |= {f"seconds_{name}": round(spent, 3) for name, spent in self._seconds.items()}
        return record | {"seconds": round(self.seconds, 3)}

    @property
    def seconds(self) -> float:
        """Time spent so far."""
        return sum(self._seconds.values())

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """The model speaks in the precision that it is trained in."""
        with self._timed("revising"), self._trainer.precision_plugin.forward_context():
            yield

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - started

    def _tell(self, doing: str) -> None:
        for listener in self._listeners():
            listener.on_server_progress(self._trainer, doing)

    def _listeners(self) -> list[ServerVisitListener]:
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        return [each for each in callbacks if isinstance(each, ServerVisitListener)]

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint inside the visit must hold beside the adapter and the optimizer.

        The pairs are in their file.
        """
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._goes_on = True
        for name in _STATE:
            setattr(self, f"_{name}", state[name])


def warn_of_nothing(counts: RevisionCounts, store: PreferenceStore, *, when: str) -> None:
    """Say so where revising gave nothing to train on."""
    if not len(store):
        reasons = ", ".join(f"{count} {why}" for why, count in counts.dropped.items())
        warn(
            f"{when}: no pair came of {counts.asked} red-team prompts ({reasons}); the server "
            "trains on nothing",
            stacklevel=2,
        )


def pairs_file(run_dir: Path, round_: int | None) -> Path:
    """Where a run keeps the pairs that a round made; None for those made before training."""
    name = "before-training" if round_ is None else f"round-{round_ + 1:04d}"
    return run_dir / "pairs" / f"{name}.jsonl"
