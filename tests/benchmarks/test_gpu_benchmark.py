"""`benchmarks/gpu.py`: it asks for a GPU, its sides do the same work, its FLOPs are right."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from warm import run_python

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SECTIONS = ["rate", "train", "chat", "guard", "revision", "adapter", "zero"]


@pytest.fixture(scope="module")
def sections() -> dict[str, Any]:
    """The lines of the quick mode by section."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    finished = run_python(FOLDER / "gpu.py", "--quick", "--device", "cpu")
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert [line["section"] for line in lines] == SECTIONS
    return {line["section"]: line for line in lines}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    yield gpu
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == FOLDER:
            del sys.modules[name]


def test_without_a_gpu_it_says_so_and_measures_nothing(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    printed = capsys.readouterr().out
    assert "needs a GPU" in printed
    assert "{" not in printed


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--device", "cpu"], "an 8B model is not for a CPU; add --quick to try the script"),
        (["--only", "train,gard"], "--only has gard; the sections are rate, train, chat"),
    ],
    ids=["large on a CPU", "unknown section"],
)
def test_arguments_without_sense_are_refused(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "chat"])
def test_sides_train_the_same_rows_from_the_same_loss(sections: dict[str, Any], name: str) -> None:
    figures = sections[name]
    sides = ["fedsafe", "hf_trainer_1", "hf_trainer_2"]
    assert list(figures["sides"]) == sides
    for side in sides:
        assert figures["first_loss"][side] == pytest.approx(
            figures["first_loss"]["fedsafe"], abs=1e-3
        )
        assert figures["tokens_per_second"][side] > 0
        assert 0 < figures["mfu"][side] < 1
    assert figures["optimizer_steps"] == 2


@pytest.mark.slow
def test_every_section_has_its_figure(sections: dict[str, Any]) -> None:
    assert sections["rate"]["matrix_tflops"] > 0
    assert sections["guard"]["vs_generate"] > 0
    assert sections["guard"]["mean_relative_diff"] < 1e-4
    assert sections["revision"]["vs_one_by_one"] > 0
    assert sections["zero"]["left_out"] == "ZeRO needs a CUDA device and DeepSpeed"
    assert sections["adapter"]["milliseconds"].keys() == {"read", "write", "into_the_mean", "mean"}
    assert all(each["quick"] and each["device"] == "cpu" for each in sections.values())


@pytest.mark.oracle
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flops_are_those_that_torch_counts(gpu: ModuleType, kv_heads: int) -> None:
    training = sys.modules["gpu_training"]
    length, rank = 24, gpu.LORA["rank"]
    shape = gpu.Shape(
        hidden=32, intermediate=48, layers=3, heads=4, vocabulary=96, kv_heads=kv_heads
    )
    rows = gpu.make_rows([length], vocabulary=96)
    model = training.peer_model(gpu.Work("", shape, rows, 1, 1, "cpu"))
    model.set_attn_implementation("eager")
    num_lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ids = torch.tensor(rows["input_ids"])
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids).logits.sum().backward()
    found = gpu.model_flops(shape, [length], num_answer_tokens=length, num_lora=num_lora)
    whole_squares = 6 * shape.layers * shape.hidden * length**2  # eager attention sees the future
    width = shape.hidden + 2 * (shape.hidden // shape.heads) * kv_heads
    # below the first layer nothing is trained, so its inputs have no gradient
    first = 2 * length * shape.hidden * (width + 3 * rank)
    assert counted.get_total_flops() == found + whole_squares - first
