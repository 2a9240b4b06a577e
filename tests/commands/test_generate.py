from pathlib import Path

import pytest
import torch

from fedsafe.cli import main
from fedsafe.commands import generate as command

Captured = pytest.CaptureFixture[str]


def generate(*arguments: str) -> int:
    return main(["generate", *arguments])


def test_an_adapter_of_a_run_answers(finished_run: Path, capfd: Captured) -> None:
    adapter = str(finished_run / "adapter")
    outputs = []
    for _ in range(2):
        assert generate("--adapter", adapter, "--prompt", "red cat", "--max_new_tokens", "5") == 0
        out, err = capfd.readouterr()
        outputs.append(out)
        assert "Loading weights" not in out + err
        assert "Warning" not in out + err
    assert outputs[0] == outputs[1]
    assert len(outputs[0].rstrip("\n")) <= 5


def test_sampled_answers_depend_on_the_seed(finished_run: Path, capfd: Captured) -> None:
    answers = []
    for seed in ("0", "0", "1"):
        sampling = ["--temperature", "1.0", "--seed", seed, "--max_new_tokens", "20"]
        adapter = str(finished_run / "adapter")
        assert generate("--adapter", adapter, "--prompt", "red cat", *sampling) == 0
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_device_and_type_of_the_weights_are_the_users(
    finished_run: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    original = command.generate_answers

    def spy(model, *args, **kwargs) -> list[str]:
        used.append((model.device.type, model.dtype))
        return original(model, *args, **kwargs)

    monkeypatch.setattr(command, "generate_answers", spy)
    common = ["--adapter", str(finished_run / "adapter"), "--prompt", "red", "--max_new_tokens"]
    assert generate(*common, "2", "--device", "cpu") == 0
    assert generate(*common, "2", "--device", "cpu", "--dtype", "bfloat16") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert generate(*common, "2") == 0
    assert used == [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float32)]
    capfd.readouterr()
    assert generate(*common, "2", "--device", "cuda") == 1
    assert "device is cuda and no CUDA device is visible; leave" in capfd.readouterr().err


def test_a_missing_adapter_is_an_error(tmp_path: Path, capsys: Captured) -> None:
    assert generate("--adapter", str(tmp_path), "--prompt", "hi") == 1
    assert "holds no adapter_config.json; give the folder of an adapter" in capsys.readouterr().err


def test_a_missing_base_is_an_error(finished_run: Path, tmp_path: Path, capsys: Captured) -> None:
    adapter = str(finished_run / "adapter")
    nowhere = str(tmp_path / "nowhere")
    assert generate("--adapter", adapter, "--prompt", "hi", "--base", nowhere) == 1
    assert "fedsafe generate: no base model at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "hi"], "adapter"),
        (["--adapter", "a", "--prompt", "hi", "--temperature", "-1"], "temperature"),
        (["--adapter", "a", "--prompt", "hi", "--max_new_tokens", "0"], "max_new_tokens"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], message: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        generate(*arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.endswith("fedsafe generate --help explains the options\n")
