"""`GuardModel`: a checkpoint that judges conversations the way its format says.

One forward pass a conversation, no generation: the verdict is the probability of the label that
comes next, as on the model card of Llama Guard 3 (https://huggingface.co/meta-llama/Llama-Guard-3-8B).
Kinds of harm are asked for the flagged conversations alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedsafe.safety.checkpoint import checkpoint_digest
from fedsafe.safety.guard import Guard, UnjudgeableError, for_each
from fedsafe.safety.guard_answers import parse_answer, parse_codes
from fedsafe.safety.guard_format import Categories, Question, load_format
from fedsafe.safety.loaded_guard import MAX_ANSWER_TOKENS, LoadedGuard, load_guard
from fedsafe.safety.prompts import GuardPrompt
from fedsafe.types import Conversation, Role, Verdict

_VERSION = 1  # raise it when a change of this package's code changes prompts or verdicts
FLAGGED = 0.5
"""Probability from which a guard is asked for the kind of harm, whatever the filter's threshold."""


class GuardModel(Guard):
    """A guard from a checkpoint.

    Args:
        format: How the guard is asked and how its answer is read: the name of a shipped format,
            such as `llama-guard-3-8b`, or the path of a YAML file.
        model: Hub name or folder of the checkpoint; None takes the one that the adapter, or else
            the format, names.
        adapter: Folder of a LoRA adapter in PEFT's format, such as `adapter/` of the run directory
            of a guard trained with `fit`.
        name: What reports call the guard; None takes the format's name.
        backend: Who computes: `transformers`, or `vllm` (needs a GPU and the extra `vllm`).
        dtype: Type of the weights.
        device: Where to compute; `auto` takes a CUDA device if there is one.
        window: Tokens that a prompt may have; None takes what the model can read, up to 8,192.
        too_long: What to do with a conversation that does not fit: judge its `head_and_tail`, or
            stop with an `error`.
        categories: Kinds of harm in place of the guard's own, code to description, for guards whose
            template takes them.
        excluded_categories: Codes of kinds of harm that do not count, for guards whose template
            takes them.
        name_categories: Whether to ask for the kinds of harm in flagged conversations.
        min_label_mass: Probability that the labels must have together where they are read, 0 to 1;
            less means that the prompt is not the guard's own.
        max_batch_tokens: Tokens of a batch, without the policy where that is read only once.
        share_prefix: Whether the policy, which every prompt begins with, is read only once.
    """

    def __init__(  # noqa: PLR0913
        self,
        format: str,
        model: str | None = None,
        adapter: str | None = None,
        name: str | None = None,
        backend: Literal["transformers", "vllm"] = "transformers",
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        window: int | None = None,
        too_long: Literal["head_and_tail", "error"] = "head_and_tail",
        categories: dict[str, str] | None = None,
        excluded_categories: list[str] | None = None,
        name_categories: bool = True,
        min_label_mass: float = 0.9,
        max_batch_tokens: int = 4096,
        share_prefix: bool = True,
    ) -> None:
        if not 0 <= min_label_mass <= 1:
            raise ValueError(f"min_label_mass is {min_label_mass}; give a number from 0 to 1")
        for setting, value in (("window", window), ("max_batch_tokens", max_batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{setting} is {value}; give 1 or more tokens")
        self._format = load_format(format)
        self._adapter = Path(adapter) if adapter is not None else None
        self._model = model or (None if adapter else self._format.model)
        self._name = name or self._format.name
        self._backend = backend
        self._dtype = dtype
        self._device = device
        self._window = window
        self._too_long = too_long
        self._categories = categories
        self._excluded = tuple(excluded_categories or ())
        self._name_categories = name_categories and self._format.categories is not None
        self._min_label_mass = min_label_mass
        self._max_batch_tokens = max_batch_tokens
        self._share_prefix = share_prefix

    @property
    def name(self) -> str:
        """See `Guard`."""
        return self._name

    @cached_property
    def identity(self) -> str:
        """See `Guard`."""
        parts = [_VERSION, checkpoint_digest(self._model, self._adapter), *self._settings()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def origin(self) -> str:
        """See `Guard`."""
        places = [each and str(Path(each).resolve()) for each in (self._model, self._adapter)]
        return json.dumps([*places, *self._settings()])

    def _settings(self) -> list[Any]:
        """What a verdict depends on beside the checkpoint."""
        return [
            asdict(self._format),
            self._backend,
            self._dtype,
            self._window,
            self._too_long,
            self._categories,
            self._excluded,
            self._name_categories,
            self._min_label_mass,  # a verdict that was kept was not checked against another
        ]

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """See `Guard`."""
        verdicts: dict[int, Verdict] = {}
        for role in ("user", "assistant", "system"):
            places = [i for i, each in enumerate(conversations) if each[-1]["role"] == role]
            if places:
                asked = [conversations[place] for place in places]
                try:
                    answered = self._judge_role(role, asked)
                except UnjudgeableError as error:
                    raise error.renumbered(places) from error
                verdicts |= dict(zip(places, answered, strict=True))
        return [verdicts[place] for place in range(len(conversations))]

    def release(self) -> None:
        """See `Guard`."""
        self.__dict__.pop("_loaded", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- one kind of question --------------------------------------------------------------------

    def _judge_role(self, role: Role, conversations: Sequence[Conversation]) -> list[Verdict]:
        """Verdicts on conversations that all end with one role; of several risks the likeliest."""
        question = self._format.question(role)
        risks: Mapping[str, Mapping[str, Any]] = self._format.risks or {"": {}}
        answered = [
            self._ask(role, question, conversations, risk=risk, options=options)
            for risk, options in risks.items()
        ]
        return [_worst(of_risks) for of_risks in zip(*answered, strict=True)]

    def _ask(
        self,
        role: Role,
        question: Question,
        conversations: Sequence[Conversation],
        *,
        risk: str,
        options: Mapping[str, Any],
    ) -> list[Verdict]:
        """What the guard says to one question, or to one of its risks."""
        prompts = self._loaded.prompts.render(conversations, options)
        if question.pattern is None:
            verdicts = self._read_labels(role, question, prompts)
        else:
            verdicts = self._read_answers(question, prompts)
        if risk:
            return [v._replace(categories=(risk,) * (v.unsafe >= FLAGGED)) for v in verdicts]
        return verdicts

    def _read_labels(
        self, role: Role, question: Question, prompts: Sequence[GuardPrompt]
    ) -> list[Verdict]:
        """Verdicts from the probabilities of the labels."""
        label_ids = self._loaded.label_ids[role]
        scorer = self._loaded.scorer
        found = scorer.label_probabilities([p.ids for p in prompts], list(label_ids.values()))
        self._check(found, list(label_ids))
        weights = torch.tensor([question.labels[label] for label in label_ids])
        weighted = found.double() * weights
        unsafe = weighted.sum(1) if scorer.exclusive else weighted.amax(1)
        likeliest = [list(label_ids)[index] for index in weighted.argmax(1).tolist()]
        codes = self._codes(role, prompts, unsafe.tolist(), likeliest)
        return [
            Verdict(min(1.0, p), named, self._name, prompt.shortened)
            for p, named, prompt in zip(unsafe.tolist(), codes, prompts, strict=True)
        ]

    def _codes(
        self,
        role: Role,
        prompts: Sequence[GuardPrompt],
        unsafe: Sequence[float],
        labels: Sequence[str],
    ) -> list[tuple[str, ...]]:
        """The kinds of harm in the flagged conversations, none in the others."""
        codes: list[tuple[str, ...]] = [()] * len(prompts)
        known = self._known_categories
        flagged = [row for row, p in enumerate(unsafe) if p >= FLAGGED]
        if not self._name_categories or known is None or not flagged:
            return codes
        if known.in_label:
            texts = [labels[row] for row in flagged]
        else:
            begun_ids = self._loaded.begun_ids[role]
            begun = [[*prompts[row].ids, *begun_ids[labels[row]]] for row in flagged]
            texts = self._loaded.scorer.answers(begun, max_new_tokens=known.max_tokens)
        for row, text in zip(flagged, texts, strict=True):
            codes[row] = parse_codes(known, text)
        return codes

    def _read_answers(self, question: Question, prompts: Sequence[GuardPrompt]) -> list[Verdict]:
        """Verdicts from what the guard writes, for one whose label does not come first."""
        ids = [prompt.ids for prompt in prompts]
        texts = self._loaded.scorer.answers(ids, max_new_tokens=MAX_ANSWER_TOKENS)
        known = self._known_categories if self._name_categories else None
        verdicts = []
        answers = for_each(lambda text: parse_answer(question, text), texts)
        for answer, prompt in zip(answers, prompts, strict=True):
            unsafe = question.labels[answer.label]
            named = parse_codes(known, answer.categories) if known and unsafe >= FLAGGED else ()
            verdicts.append(Verdict(unsafe, named, self._name, prompt.shortened))
        return verdicts

    def _check(self, probabilities: Tensor, labels: Sequence[str]) -> None:
        """Refuse what cannot be a verdict.

        Raises:
            ValueError: If the weights give no numbers, or another token than a label is likely.
        """
        if not probabilities.isfinite().all():
            raise ValueError(
                f"the guard {self._name} computes NaN; try dtype float32, and check its weights"
            )
        mass = probabilities.sum(1)
        if self._loaded.scorer.exclusive and (mass < self._min_label_mass).any():
            raise ValueError(
                f"the labels {', '.join(map(repr, labels))} of {self._format.name} have a "
                f"probability of {mass.min():.3g} together where they are read, below "
                f"min_label_mass {self._min_label_mass:g}; the checkpoint does not answer in this "
                "format: check format, model and the tokenizer's chat template"
            )

    @property
    def _known_categories(self) -> Categories | None:
        known = self._format.categories
        return replace(known, codes=self._categories) if known and self._categories else known

    @cached_property
    def _loaded(self) -> LoadedGuard:
        """The checkpoint, loaded once."""
        return load_guard(
            self._format,
            model=self._model,
            adapter=self._adapter,
            backend=self._backend,
            dtype=getattr(torch, self._dtype),
            device=self._device,
            window=self._window,
            too_long=self._too_long,
            categories=self._categories,
            excluded_categories=self._excluded,
            max_batch_tokens=self._max_batch_tokens,
            share_prefix=self._share_prefix,
        )


def _worst(of_risks: Sequence[Verdict]) -> Verdict:
    """The verdict of the likeliest risk, with the names of all that are flagged."""
    worst = max(of_risks, key=lambda verdict: verdict.unsafe)
    return worst._replace(
        categories=tuple(name for each in of_risks for name in each.categories),
        shortened=any(each.shortened for each in of_risks),
    )
