"""The server's constitutional data: revised answers to red-team prompts, and helpful answers."""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fedsafe.data.output_files import json_line, write_whole
from fedsafe.data.pairs import load_pairs
from fedsafe.data.preferences import PreferenceStore
from fedsafe.data.prompts import load_prompts
from fedsafe.data.sources import report_rejected
from fedsafe.federated.schedule import Stream, random_stream
from fedsafe.safety.revision import (
    Reviser,
    RevisionCounts,
    Speaker,
    Transcript,
    pair_record,
)
from fedsafe.strategies.layout import ONE_RANK, Layout
from fedsafe.types import PreferencePair, RedTeamPrompt, Turn

Paths = str | list[str]


class CaiAugmentation:
    """What the server trains on after the clients: pairs of revised and red responses.

    Args:
        prompts: Files or hub names of red-team prompts, which the model answers, criticises and
            revises.
        pairs: Files or hub names of ready pairs (`fedsafe revise`), in place of revising; `prompts`
            are then only asked by the adaptive regime.
        reviser: How the model revises itself.
        renew: Whether pairs are made in each round, by the global model of that round; False makes
            them once, by the model that training starts from.
        keep_refusals: Whether the model's first answers that refuse already, and are whole, are
            trained on too, by supervised fine-tuning. No gate sees them.
        helpful: Files or hub names of helpful answers to mix in: pairs, or plain conversations,
            which only supervised fine-tuning takes.
        helpful_share: Share of helpful answers in a batch, 0 to below 1.
        batch_size: Samples, or pairs, of one optimizer step.
        max_length: Tokens kept of prompt and answer, from their start.
        split: Split of the data sets that are read from the hub.
        on_bad_row: Stop at a bad row, or skip it and list it in `rejected.jsonl` of the run
            directory.
    """

    def __init__(  # noqa: PLR0913
        self,
        prompts: Paths | None = None,
        pairs: Paths | None = None,
        reviser: Reviser | None = None,
        renew: bool = True,
        keep_refusals: bool = False,
        helpful: Paths | None = None,
        helpful_share: float = 0.5,
        batch_size: int = 16,
        max_length: int = 512,
        split: str = "train",
        on_bad_row: Literal["error", "skip"] = "error",
    ) -> None:
        if prompts is None and pairs is None:
            raise ValueError("constitutional training has no data; give data.cai.prompts or .pairs")
        if not 0 <= helpful_share < 1:
            raise ValueError(f"helpful_share is {helpful_share}; give 0 to below 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; give 2 or more")
        self.reviser = reviser if reviser is not None else Reviser()
        self.renew = renew
        self._keep_refusals = keep_refusals
        self.batch_size = batch_size
        self._paths = {"prompts": prompts, "pairs": pairs, "helpful": helpful}
        self._helpful_share = helpful_share
        self._max_length = max_length
        self._reading: dict[str, Any] = {"split": split, "on_bad_row": on_bad_row}
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def load(self, tokenizer: PreTrainedTokenizerBase, *, rejected: Path | None) -> None:
        """Read the files; pairs and helpful answers become tokens here, once."""
        self._tokenizer = tokenizer
        reading = {**self._reading, "rejected": rejected}
        paths = self._paths
        self.prompts = load_prompts(paths["prompts"], **reading) if paths["prompts"] else []
        helpful = (
            load_pairs(paths["helpful"], need_rejected=False, **reading) if paths["helpful"] else []
        )
        self.ready: PreferenceStore | None = None
        """Pairs that are there before a round; None where each round makes its own."""
        ready = load_pairs(paths["pairs"], need_rejected=True, **reading) if paths["pairs"] else []
        if ready:
            self.ready = self.store_of(ready)
            if not len(self.ready):
                reason = self.ready.left_out[0].reason
                raise ValueError(f"none of {len(ready)} pairs can be trained on: {reason}")
        self.helpful = self.store_of(helpful)
        for store, pairs in ((self.ready, ready), (self.helpful, helpful)):
            if store is not None and store.left_out:
                report_rejected(store.left_out, total=len(pairs), rejected=rejected)
        self._digest = _digest(self.prompts, ready, helpful)

    @property
    def stores(self) -> list[PreferenceStore]:
        """What is there before a round: helpful answers, and pairs if they are not made."""
        return [self.helpful] if self.ready is None else [self.helpful, self.ready]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        assert self._tokenizer is not None, "load has not run yet"
        return self._tokenizer

    @property
    def makes_pairs(self) -> bool:
        """Whether the model has to answer, criticise and revise."""
        return self._paths["pairs"] is None

    def helpful_per_step(self, num_helpful: int) -> int:
        """Helpful answers of a batch, where there are `num_helpful` in all."""
        share = self._helpful_share if num_helpful else 0.0
        return min(self.batch_size - 1, round(self.batch_size * share))

    def split_prompts(
        self, num_held_out: int, *, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Prompts to train on, and prompts that are only asked; as places in `prompts`.

        Raises:
            ValueError: If nothing would be left to train on.
        """
        total = len(self.prompts)
        least = num_held_out + self.makes_pairs
        if total < least:
            raise ValueError(
                f"data.cai.prompts has {total} red-team prompts, and {num_held_out} are held out "
                "to be asked (federated.cai.num_probe); give more prompts or hold out fewer"
            )
        order = random_stream(Stream.RED_TEAM, seed).permutation(total)
        return np.sort(order[num_held_out:]), order[:num_held_out]

    def revise(
        self,
        speaker: Speaker,
        places: Sequence[int],
        *,
        seed: int,
        file: Path,
        on_progress: Callable[[int, int], None],
        layout: Layout = ONE_RANK,
    ) -> tuple[RevisionCounts, PreferenceStore]:
        """Let the model revise its answers to some prompts, and write down the pairs that are kept.

        Args:
            speaker: The model.
            places: Which of `prompts`.
            seed: Decides principles and samples.
            file: Where the pairs go, whole or not at all; the first rank writes it.
            on_progress: Told how many prompts are done, of how many.
            layout: Who does what; every rank gets all pairs.
        """
        prompts = [self.prompts[place] for place in places]
        transcripts = {}
        for place, transcript in self.reviser.revise(
            speaker, prompts, seed=seed, replicas=layout.replicas, replica=layout.replica
        ):
            transcripts[place] = transcript
            on_progress(len(transcripts), len(prompts))
        # what one rank has heard, so that all train on the same to the last word
        ordered = layout.world.from_first(lambda: [transcripts[p] for p in sorted(transcripts)])
        counts = RevisionCounts.of(ordered)
        kept = [each for each in ordered if each.dropped is None]
        refusals = [each for each in ordered if _is_own_refusal(each)]
        if not self._keep_refusals or not kept:
            refusals = []
        own = [_refusal(each) for each in refusals]
        records = [*map(pair_record, kept), *map(_plain_record, own)]
        layout.world.from_first(lambda: write_whole(file, map(json_line, records)))
        return counts, self.store_of([*(each.pair for each in kept), *own])

    def read_back(self, file: Path, *, layout: Layout = ONE_RANK) -> PreferenceStore:
        """The pairs that `revise` wrote; the first rank reads them for all.

        Raises:
            ValueError: If the file is gone.
        """
        return self.store_of(layout.world.from_first(lambda: _pairs_of(file)))

    def store_of(self, pairs: Sequence[PreferencePair]) -> PreferenceStore:
        """Pairs as tokens."""
        return PreferenceStore(pairs, self.tokenizer, max_length=self._max_length)

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it resumes."""
        return {
            "data.cai.samples": self._digest,
            "data.cai.reviser": self.reviser.identity(),
            "data.cai.renew": self.renew,
            "data.cai.keep_refusals": self._keep_refusals,
            "data.cai.helpful_share": self._helpful_share,
            "data.cai.batch_size": self.batch_size,
            "data.cai.max_length": self._max_length,
        }


def _pairs_of(file: Path) -> list[PreferencePair]:
    if not file.exists():
        raise ValueError(
            f"{file} is missing, and the checkpoint goes on with its pairs; resume from an "
            "earlier checkpoint, or start anew"
        )
    return load_pairs(str(file), need_rejected=False) if file.stat().st_size else []


def _is_own_refusal(transcript: Transcript) -> bool:
    """Whether the model itself refused, in a whole answer."""
    whole = "response" not in transcript.cut_off
    return transcript.dropped == "refused" and whole and transcript.prompt.response is None


def _refusal(transcript: Transcript) -> PreferencePair:
    """A red-team prompt and the model's own refusal of it."""
    prompt = transcript.prompt
    return PreferencePair(
        prompt.messages, transcript.init_response, None, prompt.source, prompt.row
    )


def _plain_record(pair: PreferencePair) -> dict[str, Any]:
    """An answer without a worse one, as a plain conversation, which `load_pairs` reads."""
    answer: Turn = {"role": "assistant", "content": pair.chosen}
    return {"messages": [*pair.prompt, answer]}


def _digest(*parts: Sequence[RedTeamPrompt | PreferencePair]) -> str:
    """Short digest of what was read, whatever files it came from."""
    texts = json.dumps([[each[:-2] for each in part] for part in parts])
    return blake2b(texts.encode(), digest_size=6).hexdigest()
