"""Settings of the server's constitutional training, and which samples each of its steps takes.

After the paper (Noh and Baek, 2025, https://arxiv.org/abs/2502.16691): supervised fine-tuning on
revised responses, then direct preference optimisation with the red responses as the rejected ones.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsafe.federated.schedule import ServerVisitRounds, Stream, random_stream

Regime = Literal["cheap", "full", "final", "adaptive"]
Objective = Literal["sft", "dpo"]

CHEAP_ITERATIONS = 50
_STREAMS: tuple[Objective, ...] = ("sft", "dpo")


class Mixture(NamedTuple):
    """What a phase draws its batches from."""

    objective: Objective
    revised: NDArray[np.int64]
    """The revised answers, shape ``(R,)``."""
    helpful: NDArray[np.int64]
    """The helpful ones, shape ``(H,)``; may be none."""
    revised_per_step: int
    helpful_per_step: int

    @property
    def steps_per_pass(self) -> int:
        """Steps in which every revised answer is seen once."""
        return math.ceil(len(self.revised) / self.revised_per_step)

    def samples_of(self, step: int, *, seed: int, round_: int) -> NDArray[np.int64]:
        """The samples of one step: slices of two endless streams of shuffled passes."""
        parts = [
            _slice(part, step, size, (seed, round_, _STREAMS.index(self.objective), source))
            for source, (part, size) in enumerate(
                ((self.revised, self.revised_per_step), (self.helpful, self.helpful_per_step))
            )
        ]
        return np.concatenate(parts)


def _slice(
    part: NDArray[np.int64], step: int, size: int, key: tuple[int, ...]
) -> NDArray[np.int64]:
    if not len(part) or not size:
        return part[:0]
    begin, end = step * size, (step + 1) * size
    first = begin // len(part)
    passes = [
        random_stream(Stream.SERVER_SAMPLES, *key, number).permutation(part)
        for number in range(first, math.ceil(end / len(part)))
    ]
    offset = first * len(part)
    return np.concatenate(passes)[begin - offset : end - offset]


class ConstitutionalTraining:
    """Trains the global adapter on its own revised answers, after the clients' average.

    Supervised fine-tuning on the revised responses comes first, direct preference optimisation
    (chosen: revised, rejected: red) second. Optimizer, weight decay and clipping are the clients'.

    Args:
        regime: `cheap`, a number of iterations in every round (the paper); `full`, all pairs in
            every round; `final`, only after the last round; `adaptive`, in rounds after which the
            model refuses too little, and no longer than until it refuses enough again.
        iterations: Optimizer steps of a server visit, both objectives together; None is 50 for
            `cheap` and `adaptive`, and one pass over all pairs for `full` and `final`. 0 never
            trains.
        dpo_share: Share of the iterations that optimise preferences, 0 to 1.
        prompts_per_visit: Red-team prompts that the model is asked in a visit; None is all of them
            where a visit is a pass, else as many as the iterations have a use for if every prompt
            makes a pair.
        max_passes: Times that a visit may see the same revised answer in one objective: with few
            pairs it takes fewer steps than `iterations`.
        sft_learning_rate: Learning rate on revised responses; within a visit it falls to 0.
        dpo_learning_rate: Learning rate on preferences; within a visit it falls to 0.
        warmup_steps: Steps at the start of each objective over which its rate rises.
        beta: Strength of the pull to the adapter that preferences start from, above 0.
        nll_weight: Weight of the chosen answers' negative log-likelihood beside the preferences.
        refusal_floor: For `adaptive`: percent of held-out red-team prompts that the model must
            refuse.
        num_probe: For `adaptive`: red-team prompts that are held out to be asked.
        probe_every: For `adaptive`: iterations between two looks.
    """

    def __init__(  # noqa: PLR0913
        self,
        regime: Regime = "cheap",
        iterations: int | None = None,
        dpo_share: float = 0.5,
        prompts_per_visit: int | None = None,
        max_passes: int = 3,
        sft_learning_rate: float = 5e-5,
        dpo_learning_rate: float = 5e-6,
        warmup_steps: int = 0,
        beta: float = 0.1,
        nll_weight: float = 1.0,
        refusal_floor: float = 90.0,
        num_probe: int = 32,
        probe_every: int = 10,
    ) -> None:
        if regime == "full" and iterations:
            raise ValueError(
                f"regime full trains on all pairs, iterations {iterations} has no effect; leave "
                "it out, or set regime: cheap"
            )
        if not 0 <= dpo_share <= 1:
            raise ValueError(f"dpo_share is {dpo_share}; give 0 to 1")
        if not 0 <= refusal_floor <= 100:
            raise ValueError(f"refusal_floor is {refusal_floor}; give percent, 0 to 100")
        _refuse_low(0, iterations=iterations, warmup_steps=warmup_steps)
        if not 0 <= nll_weight < math.inf:
            raise ValueError(f"nll_weight is {nll_weight}; give 0 or more")
        _refuse_low(1, prompts_per_visit=prompts_per_visit, max_passes=max_passes)
        _refuse_low(1, num_probe=num_probe, probe_every=probe_every)
        for name, value in (
            ("sft_learning_rate", sft_learning_rate),
            ("dpo_learning_rate", dpo_learning_rate),
            ("beta", beta),
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; give a number above 0")
        self.regime = regime
        self.iterations = iterations
        self.dpo_share = dpo_share
        self.prompts_per_visit = prompts_per_visit
        self.max_passes = max_passes
        self.sft_learning_rate = sft_learning_rate
        self.dpo_learning_rate = dpo_learning_rate
        self.warmup_steps = warmup_steps
        self.beta = beta
        self.nll_weight = nll_weight
        self.refusal_floor = refusal_floor
        self.num_probe = num_probe
        self.probe_every = probe_every

    @property
    def server_visits(self) -> ServerVisitRounds:
        """The rounds that have a server visit."""
        if self.iterations == 0:
            return "none"
        return "last" if self.regime == "final" else "every"

    @property
    def num_held_out(self) -> int:
        """Red-team prompts that are asked and never trained on."""
        return self.num_probe if self.regime == "adaptive" else 0

    def num_prompts(self, revised_per_step: int) -> int | None:
        """Red-team prompts that are asked in a visit; None is all there are."""
        if self.prompts_per_visit is not None:
            return self.prompts_per_visit
        steps = self._steps()
        return None if steps is None else max(steps.values()) * revised_per_step

    def num_steps(self, mixture: Mixture) -> int:
        """Optimizer steps on one objective."""
        if not len(mixture.revised):
            return 0
        steps = self._steps()
        if steps is None:
            shares = {"sft": 1 - self.dpo_share, "dpo": self.dpo_share}
            return mixture.steps_per_pass if shares[mixture.objective] else 0
        return min(steps[mixture.objective], self.max_passes * mixture.steps_per_pass)

    def learning_rate(self, objective: Objective, step: int, num_steps: int) -> float:
        """Learning rate of one step (from 0) of an objective; it falls to 0 in a straight line."""
        peak = self.sft_learning_rate if objective == "sft" else self.dpo_learning_rate
        rise = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        return peak * min(rise, 1.0) * (1 - step / num_steps)

    def _steps(self) -> dict[Objective, int] | None:
        """Steps of each objective; None is a pass over all pairs."""
        total = self.iterations
        if total is None and self.regime in ("cheap", "adaptive"):
            total = CHEAP_ITERATIONS
        if total is None:
            return None
        dpo = round(total * self.dpo_share)
        return {"sft": total - dpo, "dpo": dpo}


def _refuse_low(least: int, **values: Any) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; give {least} or more")
