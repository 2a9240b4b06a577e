"""A small guard trained from scratch on KoSBi, measured beside TF-IDF and the majority class.

    .venv/bin/python benchmarks/kosbi_guard.py [--data DIR] [--validate] [--quick]

KoSBi (Lee et al. 2023, https://arxiv.org/abs/2305.17701): a context and a sentence about social
groups, labelled safe or unsafe; here in English. The guard learns from `kosbi_valid.json` through
`fedsafe fit`: a Llama of one layer with random weights, an adapter on its layers, embeddings and
output, the format `plain`. It judges the sentence alone, which did no worse than the pair, and is
measured on `kosbi_test.json`, once for each seed. TF-IDF with logistic regression reads context and
sentence. `--validate` measures on a share of the training file instead: the settings of both were
chosen on such a share, never by the test file.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from fedsafe.cli import main as fedsafe
from fedsafe.evaluation.guard_metrics import guard_scores
from fedsafe.safety.guard import shown
from fedsafe.safety.guard_model import GuardModel

REPOSITORY = Path(__file__).resolve().parents[1]
VALIDATION_SHARE = 0.15
MEASURES = ("accuracy", "f1", "auprc")
FIT: dict[str, Any] = {
    "rounds": 3,
    "model": {
        "base": "llama",
        "from_config": {
            "vocab_size": 2000,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "initializer_range": 0.08,
        },
        "rank": 64,
        "alpha": 64,
        "target_modules": [
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            # the base is random: nothing is learnt on embeddings that stay so, and an output layer
            # that stays so leaves probability to words that are no verdict
            *("embed_tokens", "lm_head"),
        ],
        "learning_rate": 1.0e-3,
        "lr_schedule": "cosine",
        "lr_floor": 0.05,
        "weight_decay": 0.3,
    },
    "data": {
        "verdict_targets": {"format": "plain", "judge": "response"},
        "train_tokenizer": 2000,
        "partition": {"class_path": "IID", "init_args": {"num_clients": 1}},
        "batch_size": 16,
        "max_length": 256,
        "validation_share": 0.0,
    },
    "federated": {"mode": "central", "clients_per_round": 1, "local_epochs": 1},
    "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
}


class Split(NamedTuple):
    """Conversations to learn from and to measure on."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


Scores = dict[str, float]


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A row of KoSBi as a labelled conversation: the sentence answers the context."""
    turns = [("user", row["context_en"]), ("assistant", row["sentence_en"])]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "label": row["sentence_label"]}


def read(data: Path, *, validate: bool) -> Split:
    """The files as they are, or the training file alone, parted."""
    read_file = [
        json.loads((data / f"kosbi_{name}.json").read_text()) for name in ("valid", "test")
    ]
    train, test = ([conversation(row) for row in rows] for rows in read_file)
    if validate:
        random.Random(0).shuffle(train)
        held_out = round(len(train) * VALIDATION_SHARE)
        return Split(train[held_out:], train[:held_out])
    return Split(train, test)


def scores(unsafe: NDArray[np.float64], rows: Sequence[dict[str, Any]]) -> Scores:
    """The measures of probabilities of being unsafe."""
    figures = guard_scores(unsafe, _labels(rows), threshold=0.5)
    return {name: float(getattr(figures, name)) for name in MEASURES}


def _labels(rows: Sequence[dict[str, Any]]) -> NDArray[np.bool_]:
    return np.array([row["label"] == "unsafe" for row in rows])


def majority(split: Split) -> Scores:
    """The more frequent label, for all."""
    return scores(np.full(len(split.test), float(_labels(split.train).mean() >= 0.5)), split.test)


def tfidf(split: Split) -> Scores:
    """Logistic regression on the weighted words and pairs of words of context and sentence."""
    texts = [["\n".join(turn["content"] for turn in row["messages"]) for row in p] for p in split]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=3.0, max_iter=1000)
    model.fit(vectorizer.fit_transform(texts[0]), _labels(split.train))
    return scores(model.predict_proba(vectorizer.transform(texts[1]))[:, 1], split.test)


def guard(split: Split, folder: Path, *, seed: int, quick: bool) -> Scores:
    """A guard that `fedsafe fit` trained."""
    train = folder / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in split.train))
    settings = FIT | {"seed_everything": seed, "run_dir": str(folder / f"run-{seed}")}
    settings["data"] = FIT["data"] | {"path": str(train)}
    settings["rounds"] = 1 if quick else FIT["rounds"]
    config = folder / f"seed-{seed}.yaml"
    config.write_text(yaml.safe_dump(settings))
    if fedsafe(["fit", "--config", str(config)]):
        raise SystemExit(1)
    run = Path(settings["run_dir"])
    judge = GuardModel(
        format="plain",
        model=str(run / "base"),
        adapter=str(run / "adapter"),
        # so small a model keeps some probability for other words, after one short round much of it
        min_label_mass=0.0 if quick else 0.5,
    )
    part = FIT["data"]["verdict_targets"]["judge"]
    verdicts = judge.judge([shown(row["messages"], part) for row in split.test])
    return scores(np.array([verdict.unsafe for verdict in verdicts]), split.test)


def run(data: Path, *, seeds: int, validate: bool, quick: bool) -> dict[str, Any]:
    """Train and measure everything."""
    split = read(data, validate=validate)
    if quick:
        split = Split(split.train[:200], split.test[:100])
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        guards = [guard(split, Path(folder), seed=s, quick=quick) for s in range(seeds)]
    spent = (time.process_time() - started) / seeds
    return {
        "samples": {"train": len(split.train), "measured": len(split.test)},
        "measured_on": "a share of kosbi_valid.json" if validate else "kosbi_test.json",
        "guard": {name: fmean(each[name] for each in guards) for name in MEASURES},
        "guard_spread": {
            name: stdev(each[name] for each in guards) if seeds > 1 else 0.0 for name in MEASURES
        },
        "tfidf": tfidf(split),
        "majority": majority(split),
        "seeds": seeds,
        "cpu_seconds_per_guard": round(spent, 1),
        "quick": quick,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the table and the line of JSON."""
    table = Table(title=f"KoSBi, {figures['measured_on']}: {figures['samples']['measured']} rows")
    table.add_column("judge")
    for name in ("accuracy", "F1 (unsafe)", "AUPRC (unsafe)"):
        table.add_column(name, justify="right")
    spread = figures["guard_spread"]
    own = [f"{figures['guard'][name]:.3f} ± {spread[name]:.3f}" for name in MEASURES]
    table.add_row(f"guard from scratch, {figures['seeds']} seeds", *own)
    for row, name in (("tfidf", "TF-IDF + logistic regr."), ("majority", "majority class")):
        table.add_row(name, *(f"{figures[row][measure]:.3f}" for measure in MEASURES))
    Console().print(table)
    print(json.dumps(figures))


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("FEDSAFE_DATA", REPOSITORY.parent / "shared" / "data")
    parser.add_argument(
        "--data", type=Path, default=Path(default) / "kosbi", help="folder of KoSBi"
    )
    parser.add_argument("--seeds", type=int, default=3, help="guards to train")
    parser.add_argument("--validate", action="store_true", help="do not look at the test file")
    parser.add_argument("--quick", action="store_true", help="seconds, to try the script")
    arguments = parser.parse_args()
    if not (arguments.data / "kosbi_valid.json").is_file():
        parser.error(f"there is no KoSBi in {arguments.data}; give its folder as --data")
    show(
        run(
            arguments.data,
            seeds=1 if arguments.quick else arguments.seeds,
            validate=arguments.validate,
            quick=arguments.quick,
        )
    )


if __name__ == "__main__":
    main()
