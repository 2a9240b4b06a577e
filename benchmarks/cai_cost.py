"""What each regime of constitutional training costs at the paper's sizes, counted and not run.

The paper's S-CAI20K has some 20,000 pairs; rounds are 50, batches 16, and the cheap regime takes 50
iterations a round in place of an epoch. Steps come from fedsafe's own plan of a visit; tokens from
rows as long as chats are. The adaptive regime's share of rounds depends on the data: it is an
argument, to be filled in from a run.
"""

import argparse
import json
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedsafe.federated.constitutional_training import ConstitutionalTraining, Mixture, Objective

REGIMES: dict[str, dict[str, Any]] = {
    "full": {"regime": "full"},
    "full, SFT alone": {"regime": "full", "dpo_share": 0.0},
    "cheap": {"regime": "cheap", "iterations": 50},
    "final": {"regime": "final"},
}


def cost(
    settings: dict[str, Any], *, lengths: np.ndarray, rounds: int, batch: int
) -> dict[str, int]:
    """Steps and trained tokens of a run; a preference has two answers, and a reference pass."""
    training = ConstitutionalTraining(**settings)
    visits = {"every": rounds, "last": 1, "none": 0}[training.server_visits]
    steps, tokens = 0, 0
    for objective, answers in (("sft", 1), ("dpo", 2)):
        name: Objective = objective  # type: ignore[assignment]
        mixture = Mixture(name, np.arange(len(lengths)), np.arange(0), batch, 0)
        num_steps = training.num_steps(mixture)
        seen = [mixture.samples_of(step, seed=0, round_=0) for step in range(num_steps)]
        steps += num_steps * visits
        tokens += answers * visits * sum(int(lengths[part].sum()) for part in seen)
    return {"steps": steps, "tokens": tokens}


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000, help="Pairs of a pass.")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="A hundredth of the pairs.")
    options = parser.parse_args()
    num_pairs = options.pairs // 100 if options.quick else options.pairs
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.8, 0.8, num_pairs), 24, 512).astype(np.int64)
    sizes: dict[str, Any] = {"lengths": lengths, "rounds": options.rounds, "batch": options.batch}
    costs = {name: cost(settings, **sizes) for name, settings in REGIMES.items()}
    table = Table(title=f"{num_pairs:,} pairs, {options.rounds} rounds, batches of {options.batch}")
    for heading in ("regime", "steps", "tokens, millions", "saved against full"):
        table.add_column(heading, justify="left" if heading == "regime" else "right")
    saved = {name: 1 - each["tokens"] / costs["full"]["tokens"] for name, each in costs.items()}
    for name, each in costs.items():
        millions = f"{each['tokens'] / 1e6:,.1f}"
        table.add_row(name, f"{each['steps']:,}", millions, f"{saved[name]:.1%}")
    Console().print(table)
    against_sft = 1 - costs["cheap"]["steps"] / costs["full, SFT alone"]["steps"]
    print(
        json.dumps(
            {
                "quick": options.quick,
                "costs": costs,
                "saved": saved,
                "cheap_saves_steps_of_one_epoch": against_sft,
            }
        )
    )


if __name__ == "__main__":
    main()
