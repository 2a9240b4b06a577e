import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedsafe.cli import main
from fedsafe.evaluation import refusal_probe
from fedsafe.evaluation.refusal_probe import RefusalProbe
from fedsafe.safety.refusal_openings import common_openings

Captured = pytest.CaptureFixture[str]
Fit = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(4)))
    return file


@pytest.fixture
def fit(tmp_path: Path, tiny_gpt2: Path, prompts: Path) -> Fit:
    """Fit two rounds with the probe, or without it; returns the rows of `rounds.jsonl`."""
    rng = random.Random(0)
    rows = [{"prompt": "ab " * rng.randint(1, 4), "response": "cd", "client": c} for c in "aabbcc"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))

    def run(name: str, *arguments: str, probe: dict[str, Any] | None) -> list[dict[str, Any]]:
        probes = [] if probe is None else [probe]
        settings = {
            "rounds": 2,
            "run_dir": str(tmp_path / name),
            "model": {"base": str(tiny_gpt2), "rank": 2, "lora_dropout": 0.2},
            "data": {"path": str(data), "partition": "Natural", "validation_share": 0.2},
            "federated": {"local_steps": 2},
            "trainer": {
                "accelerator": "cpu",
                "callbacks": [
                    {"class_path": "fedsafe.evaluation.refusal_probe.RefusalProbe", "init_args": p}
                    for p in probes
                ],
            },
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        status = main(["fit", "--config", str(file), *arguments])
        log = tmp_path / name / "rounds.jsonl"
        assert status == 0 or not log.exists()
        return [json.loads(line) for line in log.open()] if status == 0 else []

    return run


def fabricate(monkeypatch: pytest.MonkeyPatch, *rounds: list[str]) -> list[int]:
    """Let the model answer so in each round; returns the seeds it was asked with."""
    seeds: list[int] = []

    def answers(*args: object, seed: int, **kwargs: object) -> list[str]:
        seeds.append(seed)
        return rounds[len(seeds) - 1]

    monkeypatch.setattr(refusal_probe, "generate_answers", answers)
    return seeds


def test_the_share_of_refused_prompts_is_logged_round_by_round(
    fit: Fit, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = fabricate(
        monkeypatch,
        ["I cannot help", "sure", "I'm sorry", "  As an AI model"],
        ["sure", "sure", "sure", "I\N{RIGHT SINGLE QUOTATION MARK}m Sorry, no"],
    )
    rows = fit("run", probe={"path": str(prompts)})
    assert [row["val/refusal_rate"] for row in rows] == [75.0, 25.0]
    assert seeds == [0, 1]


def test_a_round_that_is_not_probed_does_not_show_the_one_before(
    fit: Fit, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabricate(monkeypatch, ["i cannot"] * 4)
    rows = fit("run", "--rounds", "3", probe={"path": str(prompts), "every_n_rounds": 2})
    assert [row.get("val/refusal_rate") for row in rows] == [None, 100.0, None]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_looking_does_not_change_the_run(
    fit: Fit, prompts: Path, tmp_path: Path, temperature: float
) -> None:
    """Dropout is on: a random number drawn by the probe, or a mode left changed, would show."""
    with_probe = fit("with", probe={"path": str(prompts), "temperature": temperature})
    without = fit("without", probe=None)
    assert [row["loss"] for row in with_probe] == [row["loss"] for row in without]
    adapters = [tmp_path / n / "adapter/adapter_model.safetensors" for n in ("with", "without")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    states = [
        torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=False)
        for n in ("with", "without")
    ]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name])


def test_a_probe_without_validation_is_an_error(fit: Fit, prompts: Path, capsys: Captured) -> None:
    assert fit("run", "--data.validation_share", "0", probe={"path": str(prompts)}) == []
    assert "no sample is held out; set data.validation_share above 0" in capsys.readouterr().err


def test_a_bad_file_of_prompts_is_an_error(prompts: Path) -> None:
    prompts.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2: has a column `promt`; rename"):
        RefusalProbe(str(prompts)).setup(None, None, "fit")  # type: ignore[arg-type]


def test_only_the_first_prompts_are_asked(prompts: Path) -> None:
    probe = RefusalProbe(str(prompts), num_prompts=2)
    probe.setup(None, None, "fit")  # type: ignore[arg-type]
    assert probe.prompts == [[{"role": "user", "content": f"question {n}"}] for n in range(2)]


def test_a_prompt_of_several_turns_is_asked_whole(prompts: Path) -> None:
    turns = [{"role": r, "content": "hi"} for r in ("system", "user", "assistant", "user")]
    prompts.write_text(json.dumps({"prompt": turns}))
    probe = RefusalProbe(str(prompts))
    probe.setup(None, None, "fit")  # type: ignore[arg-type]
    assert probe.prompts == [turns]


@pytest.mark.parametrize("name", ["num_prompts", "every_n_rounds"])
def test_zero_prompts_or_rounds_are_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} of the refusal probe is 0; give 1 or more"):
        RefusalProbe("prompts.jsonl", **{name: 0})


def test_openings_of_ones_own_replace_the_common_ones() -> None:
    assert RefusalProbe("p", openings=["nope"]).openings == ["nope"]
    assert RefusalProbe("p").openings == common_openings()
