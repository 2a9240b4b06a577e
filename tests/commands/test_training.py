import csv
import errno
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from warm import run_python, start_python

from fedsafe.cli import main
from fedsafe.federated.rounds import FederatedRounds

Captured = pytest.CaptureFixture[str]


def test_a_run_directory_holds_the_files_of_the_contract(finished_run: Path) -> None:
    names = {file.name for file in finished_run.iterdir()}
    assert names == {
        "adapter",
        "before.json",
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "report.html",
        "rounds.jsonl",
        "rounds.png",
        "run.json",
        "tensorboard",
    }
    assert [file.name for file in (finished_run / "checkpoints").iterdir()] == ["last.ckpt"]


def test_metrics_have_a_row_a_round(finished_run: Path) -> None:
    rows = list(csv.DictReader((finished_run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert [row["step"] for row in rows] == ["3", "7"]
    assert {"train/loss", "val/loss", "val/prompts/refusal_rate"} < rows[0].keys()
    assert all(float(value) >= 0 for row in rows for value in row.values())


def test_output_into_a_file_is_short(fit, tmp_path: Path, capfd: Captured) -> None:
    assert fit(tmp_path / "run") == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert sum(line.startswith("round ") for line in lines) == 2
    assert "round 1/2 · val/loss" in out
    assert "Partition" in out
    assert "Summary" in out
    assert len(lines) < 30
    assert max(map(len, lines)) <= 80 + len(str(tmp_path))
    for noise in ("Tip", "litlogger", "FutureWarning", "Loading weights", "weights_only", "it/s"):
        assert noise not in out + err


def test_a_run_directory_with_a_run_is_refused(fit, finished_run: Path, capsys: Captured) -> None:
    before = (finished_run / "rounds.jsonl").read_bytes()
    assert fit(finished_run) == 1
    assert (
        "holds another run (rounds.jsonl, checkpoints, adapter); resume" in capsys.readouterr()[1]
    )
    assert (finished_run / "rounds.jsonl").read_bytes() == before


def test_a_run_that_failed_before_its_first_round_can_be_corrected(fit, tmp_path: Path) -> None:
    assert fit(tmp_path / "run", "--federated.clients_per_round", "99") == 1
    assert fit(tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "nowhere.jsonl"], "nowhere.jsonl is missing; give the path"),
        (["--model.base", "./nowhere"], "nowhere"),
        (["--federated.clients_per_round", "99"], "clients_per_round is 99, but there are 4"),
        (["--model.target_modules", "[q_proj]"], "it has c_attn, c_fc, c_proj"),
        (["--model.rank", "0"], "rank of the adapter is 0; give 1 or more"),
        (["--checkpoint.every_n_steps", "0"], "every_n_steps is 0; give 1 or more"),
        (["--trainer.limit_train_batches", "2"], "rounds need limit_train_batches=1.0"),
        (["--trainer.precision", "16-true"], "would round the adapter"),
        (["--federated.failure_probability", "1.0"], "failure_probability"),
        (["--ckpt_path", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt; give a file or"),
        (["--ckpt_path", "last"], "there is no run to resume in"),
        (["--federated.mode", "local", "--federated.server_optimizer", "FedAdam"], "no federated"),
        (["--trainer.accelerator", "gpu"], "No supported gpu backend found"),
    ],
)
def test_bad_input_is_one_clear_line(
    fit, tmp_path: Path, capsys: Captured, arguments: list[str], message: str
) -> None:
    if arguments[-1] == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert fit(tmp_path / "run", *arguments) == 1
    err = capsys.readouterr().err
    [line] = [line for line in err.splitlines() if line.startswith("fedsafe fit: ")]
    assert message in err[err.index(line) :]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.rnk", "3"], "--model.rnk"),
        (["--model.rank", "many"], "model.rank"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--data.partition", "Thirds"], "Thirds"),
        (["--seed_everything", "true"], "seed_everything"),
        (["--seed_everything", "-1"], "seed_everything"),
    ],
)
def test_wrong_arguments_exit_with_2_and_no_page_of_usage(
    fit, tmp_path: Path, capsys: Captured, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path / "run", *arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert "fedsafe fit --help explains the options" in err
    assert "usage:" not in err


def test_missing_arguments_are_named(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit"])
    assert caught.value.code == 2
    assert "model.base" in capsys.readouterr().err


def test_a_configuration_of_the_miniature_without_it_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    demo = Path("configs/demo.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(demo)]) == 1
    assert (
        "runs/world/clients.jsonl is missing; write the miniature first: "
        "fedsafe world --output runs/world\n"
    ) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_debugging_shows_where_an_error_came_from(
    fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSAFE_DEBUG", "1")
    with pytest.raises(ValueError, match=r"nowhere.jsonl is missing"):
        fit(tmp_path / "run", "--data.path", "nowhere.jsonl")


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(
    fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(FederatedRounds, "on_before_optimizer_step", interrupt)
    try:
        assert fit(tmp_path / "run") == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal while it shuts down
    err = capsys.readouterr().err
    assert "fedsafe fit was interrupted; the same command with --ckpt_path last goes on" in err


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "rounds.jsonl").open()]


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_finished_run_is_resumed_for_more_rounds(fit, tmp_path: Path) -> None:
    assert fit(tmp_path / "long", "--rounds", "3") == 0
    assert fit(tmp_path / "run", "--rounds", "2") == 0
    assert fit(tmp_path / "run", "--rounds", "3", "--ckpt_path", "last") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "long")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "long")
    metrics = [(tmp_path / name / "metrics.csv").read_text() for name in ("run", "long")]
    assert metrics[0] == metrics[1]


def test_resuming_a_finished_run_changes_nothing(fit, finished_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    assert fit(run_dir, "--ckpt_path", "last") == 0
    for name in ("rounds.jsonl", "metrics.csv", "adapter/adapter_model.safetensors"):
        assert (run_dir / name).read_bytes() == (finished_run / name).read_bytes()


def test_a_measure_lost_between_checkpoint_and_metrics_is_filled_in(
    fit, finished_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    rows = (run_dir / "metrics.csv").read_text().splitlines(keepends=True)
    (run_dir / "metrics.csv").write_text("".join(rows[:-1]))
    assert fit(run_dir, "--ckpt_path", "last") == 0
    assert (run_dir / "metrics.csv").read_text() == (finished_run / "metrics.csv").read_text()


def test_a_run_killed_in_its_first_round_begins_again(
    fit, finished_run: Path, tmp_path: Path, capsys: Captured
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    lines = (run_dir / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "rounds.jsonl").write_text(lines[0])
    assert fit(run_dir, "--ckpt_path", "last") == 0
    assert "has no checkpoint yet; the run begins again" in capsys.readouterr().err
    assert losses(run_dir) == losses(finished_run)
    assert (run_dir / "metrics.csv").read_text() == (finished_run / "metrics.csv").read_text()


def test_finished_rounds_without_their_checkpoint_are_not_thrown_away(
    fit, finished_run: Path, tmp_path: Path, capsys: Captured
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    assert fit(run_dir, "--ckpt_path", "last") == 1
    assert "has 2 finished rounds but no checkpoints/last.ckpt" in capsys.readouterr().err
    assert losses(run_dir) == losses(finished_run)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--seed_everything", "1"], "model.seed was 0 and is 1"),
        (["--model.rank", "3"], "model.rank was 2 and is 3"),
        (["--data.batch_size", "3"], "data.batch_size was 4 and is 3"),
        (["--federated.server_optimizer", "FedAdam"], "federated.algorithm"),
    ],
)
def test_resuming_under_other_settings_is_refused(
    fit, finished_run: Path, tmp_path: Path, capsys: Captured, arguments: list[str], name: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    before = (run_dir / "config.yaml").read_bytes()
    for checkpoint in ("last", str(run_dir / "checkpoints" / "last.ckpt")):
        status = fit(run_dir, "--rounds", "3", "--ckpt_path", checkpoint, *arguments)
        err = capsys.readouterr().err
        assert status == 1, err
        assert "the checkpoint belongs to another run" in err
        assert name in err
        assert (run_dir / "config.yaml").read_bytes() == before


def test_a_copy_of_the_configuration_starts_the_same_run(
    finished_run: Path, tmp_path: Path
) -> None:
    copy = str(finished_run / "config.yaml")
    assert main(["fit", "--config", copy, "--run_dir", str(tmp_path / "run")]) == 0
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished_run)


def test_the_copy_of_a_resumed_configuration_does_not_resume(
    fit, finished_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    assert fit(run_dir, "--rounds", "3", "--ckpt_path", "last") == 0
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["ckpt_path"] is None


@pytest.mark.parametrize("checkpoint", [[], ["--ckpt_path", "last"]], ids=["default", "last"])
def test_validate_measures_the_checkpoint_and_leaves_the_run_alone(
    config: Path, finished_run: Path, tmp_path: Path, checkpoint: list[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    arguments = ["--config", str(config), "--run_dir", str(run_dir), *checkpoint]
    assert main(["validate", *arguments]) == 0
    measured = json.loads((run_dir / "results.json").read_text())
    [*_, last] = map(json.loads, (run_dir / "rounds.jsonl").open())
    assert measured["val/loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert 0 <= measured["val/prompts/refusal_rate"] <= 100
    for name in ("metrics.csv", "config.yaml", "rounds.jsonl"):
        assert (run_dir / name).read_bytes() == (finished_run / name).read_bytes()


def test_test_adds_its_measure_to_the_results(
    config: Path, finished_run: Path, tmp_path: Path, capsys: Captured
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    (run_dir / "results.json").write_text('{"val/loss": 1.5}')
    common = ["test", "--config", str(config), "--run_dir", str(run_dir), "--ckpt_path", "last"]
    assert main(common) == 1
    assert "there is nothing to test on; give data.benchmarks" in capsys.readouterr().err
    path = yaml.safe_load(config.read_text())["data"]["path"]
    assert main([*common, "--data.test_path", path]) == 0
    measured = json.loads((run_dir / "results.json").read_text())
    assert measured["val/loss"] == 1.5
    assert measured["test/loss"] > 0


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize("checkpoint", [[], ["--ckpt_path", "last"]], ids=["default", "last"])
def test_nothing_is_measured_without_a_checkpoint(
    config: Path, tmp_path: Path, capsys: Captured, command: str, checkpoint: list[str]
) -> None:
    run_dir = tmp_path / "none"
    assert main([command, "--config", str(config), "--run_dir", str(run_dir), *checkpoint]) == 1
    assert "there is no checkpoint to measure in" in capsys.readouterr().err
    assert not run_dir.exists()


def test_a_run_without_a_global_adapter_is_not_measured(
    config: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = ["--config", str(config), "--run_dir", str(tmp_path), "--federated.mode", "local"]
    assert main(["validate", *arguments]) == 1
    assert "mode `local` has no global adapter to validate" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_good_checkpoint(
    fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert fit(tmp_path / "whole") == 0
    save, saved = torch.save, []

    def save_until_full(checkpoint, file) -> None:
        saved.append(checkpoint)
        if len(saved) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_until_full)
        assert fit(tmp_path / "run") == 1
    assert "still holds the last good one. Free some space and resume with" in (
        capsys.readouterr().err
    )
    assert fit(tmp_path / "run", "--ckpt_path", "last") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_any_logger_of_lightning_works_from_the_configuration(fit, tmp_path: Path) -> None:
    settings = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "mine"), "name": "run", "version": 0},
    }
    extra = tmp_path / "logger.yaml"
    extra.write_text(yaml.safe_dump({"trainer": {"logger": settings}}))
    assert fit(tmp_path / "run", "--config", str(extra)) == 0
    assert "val/loss" in (tmp_path / "mine/run/version_0/metrics.csv").read_text()
    assert (tmp_path / "run/metrics.csv").exists()
    assert not (tmp_path / "run/tensorboard").exists()


def test_without_a_logger_nothing_is_logged(fit, tmp_path: Path) -> None:
    assert fit(tmp_path / "run", "--trainer.logger", "false") == 0
    assert not (tmp_path / "run/metrics.csv").exists()
    assert (tmp_path / "run/rounds.jsonl").exists()


def test_early_stopping_counts_rounds(fit, tmp_path: Path) -> None:
    stop = {
        "class_path": "EarlyStopping",
        "init_args": {"monitor": "train/loss", "mode": "max", "patience": 1},
    }
    extra = tmp_path / "stop.yaml"
    extra.write_text(yaml.safe_dump({"trainer": {"callbacks": [stop]}}))
    assert fit(tmp_path / "run", "--config", str(extra), "--rounds", "20") == 0
    assert 2 <= len(losses(tmp_path / "run")) < 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_three_times_and_resumed_is_the_same_as_never_killed(
    config: Path, tmp_path: Path, seed: int
) -> None:
    """The kills fall anywhere: in a visit, while a file is written."""
    import random

    rng = random.Random(seed)
    extra = tmp_path / "long.yaml"
    extra.write_text(
        yaml.safe_dump({"rounds": 12, "federated": {"clients_per_round": 3, "local_steps": 15}})
    )

    def command(name: str, *more: str) -> list[str]:
        configs = ["--config", str(config), "--config", str(extra)]
        run_dir = ["--run_dir", str(tmp_path / name)]
        return ["-m", "fedsafe", "fit", *configs, *run_dir, *more]

    assert run_python(*command("whole")).returncode == 0
    for number in range(3):
        more = ["--ckpt_path", "last"] if number else []
        process = start_python(*command("killed", *more), output=tmp_path / "output.txt")
        target = rng.uniform(1 + 3 * number, 3 + 3 * number)  # in rounds
        wait_for_rounds(tmp_path / "killed" / "rounds.jsonl", int(target))
        time.sleep(rng.random() / 4)
        assert process.poll() is None, "the run ended before the kill"
        process.kill()
        process.wait()
    assert run_python(*command("killed", "--ckpt_path", "last")).returncode == 0

    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")
    assert rows_without_seconds(tmp_path / "killed") == rows_without_seconds(tmp_path / "whole")
    metrics = [(tmp_path / name / "metrics.csv").read_text() for name in ("killed", "whole")]
    assert metrics[0] == metrics[1]
    assert len(metrics[0].splitlines()) == 13


def wait_for_rounds(file: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while not file.exists() or len(file.read_text().splitlines()) < number:
        assert time.monotonic() < deadline, f"{file} has not got {number} rounds in time"
        time.sleep(0.01)


def rows_without_seconds(run_dir: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (run_dir / "rounds.jsonl").open()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
