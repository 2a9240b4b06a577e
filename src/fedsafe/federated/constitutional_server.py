"""The server's side of constitutional training, through all rounds of a run."""

import time
from pathlib import Path
from typing import Any

from lightning import Trainer

from fedsafe.data.augmentation import CaiAugmentation
from fedsafe.federated.constitutional_training import ConstitutionalTraining
from fedsafe.federated.schedule import Stream, derive_seed
from fedsafe.federated.server_visit import ServerVisit, pairs_file, warn_of_nothing
from fedsafe.model.module import LoraLM
from fedsafe.safety.model_speaker import ModelSpeaker
from fedsafe.strategies.layout import layout_of


class ConstitutionalServer:
    """The server's side of constitutional training, through all rounds of a run.

    Args:
        rules: The settings.
        data: Prompts, pairs and helpful answers.
        trainer: The Trainer of the run.
        module: The model.
        seed: Seed of every draw.
    """

    def __init__(
        self,
        rules: ConstitutionalTraining,
        data: CaiAugmentation,
        *,
        trainer: Trainer,
        module: LoraLM,
        seed: int,
    ) -> None:
        self._rules = rules
        self._data = data
        self._trainer = trainer
        self._module = module
        self._seed = seed
        self._layout = layout_of(trainer.strategy)
        data.split_prompts(rules.num_held_out, seed=seed)  # refuses too few, before anything is run

    def begin(self, round_: int, resumed: dict[str, Any] | None) -> ServerVisit:
        """The visit of a round (from 0); of a run that is resumed, as its checkpoint left it."""
        visit = ServerVisit(
            self._rules,
            self._data,
            trainer=self._trainer,
            module=self._module,
            round_=round_,
            seed=self._seed,
        )
        if resumed is not None and resumed["server_visit"] is not None:
            visit.load_state_dict(resumed["server_visit"])
        return visit

    def start(self, resumed: dict[str, Any] | None) -> dict[str, Any] | None:
        """Call before the first batch; makes the pairs that serve all rounds, or reads them back.

        Args:
            resumed: State of the run that goes on; None for a new one.

        Returns:
            What making the pairs cost; None where each round makes its own.
        """
        if resumed is not None and resumed["server_visit"] is not None:
            # Lightning counts the batch under way as one that stepped, which it will do yet
            self._trainer.fit_loop.epoch_loop._batches_that_stepped -= 1
        if self._rules.server_visits == "none" or self._data.renew or not self._data.makes_pairs:
            return None
        if resumed is None:
            return self._make_pairs()
        self._data.ready = self._data.read_back(self._file, layout=self._layout)
        cost: dict[str, Any] = resumed["pairs_before"]
        return cost

    def _make_pairs(self) -> dict[str, Any]:
        started = time.perf_counter()
        places = self._data.split_prompts(self._rules.num_held_out, seed=self._seed)[0]
        with self._trainer.precision_plugin.forward_context():  # as in the visits
            counts, self._data.ready = self._data.revise(
                ModelSpeaker(self._module.peft_model, self._data.tokenizer),
                places.tolist(),
                seed=derive_seed(Stream.REVISION, self._seed),
                file=self._file,
                on_progress=lambda *_: None,
                layout=self._layout,
            )
        warn_of_nothing(counts, self._data.ready, when="before training")
        seconds = round(time.perf_counter() - started, 3)
        return {**counts.as_dict(), "seconds_revising": seconds, "seconds": seconds}

    @property
    def _file(self) -> Path:
        return pairs_file(Path(self._trainer.default_root_dir), None)
