import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from stub_benchmark import StubBenchmark

from fedsafe.cli import main
from fedsafe.evaluation.benchmark import Respondent
from fedsafe.evaluation.safety_probe import SafetyProbe
from fedsafe.model.generation import generate_answers

Captured = pytest.CaptureFixture[str]
Fit = Callable[..., list[dict[str, Any]]]

STUB = {"class_path": "stub_benchmark.StubBenchmark"}
MEASURE = "val/stub/rate"


@pytest.fixture
def fit(tmp_path: Path, tiny_gpt2: Path) -> Fit:
    """Fit two rounds with the probe, or without it; returns the rows of `rounds.jsonl`."""
    rng = random.Random(0)
    rows = [{"prompt": "ab " * rng.randint(1, 4), "response": "cd", "client": c} for c in "aabbcc"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))

    def run(name: str, *arguments: str, probe: dict[str, Any] | None) -> list[dict[str, Any]]:
        probes = [] if probe is None else [{"benchmarks": [STUB], **probe}]
        path = "fedsafe.evaluation.safety_probe.SafetyProbe"
        settings = {
            "rounds": 2,
            "run_dir": str(tmp_path / name),
            "model": {"base": str(tiny_gpt2), "rank": 2, "lora_dropout": 0.2},
            "data": {"path": str(data), "partition": "Natural", "validation_share": 0.2},
            "federated": {"local_steps": 2},
            "trainer": {
                "accelerator": "cpu",
                "callbacks": [{"class_path": path, "init_args": p} for p in probes],
            },
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        status = main(["fit", "--config", str(file), *arguments])
        log = tmp_path / name / "rounds.jsonl"
        return [json.loads(line) for line in log.open()] if status == 0 else []

    return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places that were asked; an item scores the number of the look at the run, from 0."""
    places: list[int] = []

    def score(respondent: Respondent, place: int) -> float:
        places.append(place)
        return float(places.count(place) - 1)

    monkeypatch.setattr(StubBenchmark, "score", staticmethod(score))
    return places


def test_a_probe_looks_before_the_first_round_and_after_each(
    fit: Fit, calls: list[int], tmp_path: Path
) -> None:
    rows = fit("run", probe={})
    assert json.loads((tmp_path / "run/before.json").read_text()) == {MEASURE: 0.0}
    assert [row[MEASURE] for row in rows] == [1.0, 2.0]


def test_a_round_that_is_not_probed_does_not_show_the_one_before(
    fit: Fit, calls: list[int]
) -> None:
    rows = fit("run", "--rounds", "3", probe={"every_n_rounds": 2})
    assert [row.get(MEASURE) for row in rows] == [None, 1.0, None]


def test_a_resumed_run_keeps_what_was_measured_before_it(
    fit: Fit, calls: list[int], tmp_path: Path
) -> None:
    fit("run", probe={})
    before = (tmp_path / "run/before.json").read_bytes()
    rows = fit("run", "--rounds", "3", "--ckpt_path", "last", probe={})
    assert (tmp_path / "run/before.json").read_bytes() == before
    assert [row[MEASURE] for row in rows] == [1.0, 2.0, 3.0]


def test_items_are_spread_over_the_whole_benchmark(fit: Fit, calls: list[int]) -> None:
    stub = {**STUB, "init_args": {"num": 10}}
    fit("run", "--rounds", "1", probe={"benchmarks": [stub], "num_items": 4})
    assert calls == [0, 2, 5, 7] * 2


def test_an_item_without_a_score_is_left_out_of_the_mean(fit: Fit) -> None:
    stub = {**STUB, "init_args": {"num": 3, "unscored": 0}}
    assert [row[MEASURE] for row in fit("run", probe={"benchmarks": [stub]})] == [1.5, 1.5]


def test_several_benchmarks_are_asked_under_their_names(fit: Fit) -> None:
    stubs = [
        {**STUB, "init_args": {"name": name, "num": num}} for name, num in (("a", 1), ("b", 3))
    ]
    rows = fit("run", probe={"benchmarks": stubs})
    assert [(row["val/a/rate"], row["val/b/rate"]) for row in rows] == [(0.0, 1.0)] * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_looking_does_not_change_the_run(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Dropout is on: a random number drawn by the probe, or a mode left changed, would show."""

    def score(respondent: Respondent, place: int) -> float:
        chat = [{"role": "user", "content": "hello"}]
        model, tokenizer = respondent.model, respondent.tokenizer
        options: Any = {"max_new_tokens": 4, "temperature": temperature}
        return float(len(generate_answers(model, tokenizer, [chat], **options)[0]))

    monkeypatch.setattr(StubBenchmark, "score", staticmethod(score))
    with_probe = fit("with", probe={})
    without = fit("without", probe=None)
    assert [row["loss"] for row in with_probe] == [row["loss"] for row in without]
    adapters = [tmp_path / n / "adapter/adapter_model.safetensors" for n in ("with", "without")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_the_adapter_that_is_asked_is_the_round_s_average(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []

    def score(respondent: Respondent, place: int) -> float:
        parameters = [p for n, p in respondent.model.named_parameters() if "lora_B" in n]
        norms.append(sum(p.abs().sum().item() for p in parameters))
        return 0.0

    monkeypatch.setattr(StubBenchmark, "score", staticmethod(score))
    fit("run", "--rounds", "1", probe={"num_items": 1})
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    final = sum(t.abs().sum().item() for n, t in saved.items() if "lora_B" in n)
    assert norms[0] == 0.0
    assert norms[1] == pytest.approx(final)


def test_early_stopping_watches_it(fit: Fit, calls: list[int]) -> None:
    stop = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": MEASURE, "mode": "min", "patience": 1},
    }
    rows = fit("run", "--rounds", "6", "--trainer.callbacks+", json.dumps(stop), probe={})
    assert [row[MEASURE] for row in rows] == [1.0, 2.0]  # it only grows


def test_early_stopping_may_watch_a_measure_of_some_rounds(fit: Fit, calls: list[int]) -> None:
    stop = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": MEASURE, "mode": "min", "patience": 1, "strict": False},
    }
    callbacks = ("--rounds", "8", "--trainer.callbacks+", json.dumps(stop))
    rows = fit("run", *callbacks, probe={"every_n_rounds": 2})
    assert [row.get(MEASURE) for row in rows] == [None, 1.0, None, 2.0]


def test_what_a_look_loaded_is_released_after_it(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[str] = []
    monkeypatch.setattr(StubBenchmark, "released", released)
    fit("run", probe={})
    assert released == ["stub"] * 3


def test_a_probe_without_validation_is_an_error(fit: Fit, capsys: Captured) -> None:
    assert fit("run", "--data.validation_share", "0", probe={}) == []
    assert "no sample is held out; set data.validation_share above 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["num_items", "every_n_rounds"])
def test_zero_items_or_rounds_are_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} of the safety probe is 0; give 1 or more"):
        SafetyProbe([StubBenchmark()], **{name: 0})


def test_no_benchmark_and_two_of_a_name_are_errors() -> None:
    with pytest.raises(ValueError, match="the safety probe has no benchmarks; give one or more"):
        SafetyProbe([])
    with pytest.raises(ValueError, match="two benchmarks are called stub; give each a name"):
        SafetyProbe([StubBenchmark(), StubBenchmark()])
