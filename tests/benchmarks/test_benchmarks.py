"""Each benchmark's quick mode runs and ends with a line of JSON that has the promised keys."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from warm import run_python

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"

needs_peers = pytest.mark.skipif(
    find_spec("accelerate") is None,
    reason="transformers.Trainer needs accelerate; pip install 'fedsafe[bench]'",
)
needs_trl = pytest.mark.skipif(
    find_spec("trl") is None, reason="TRL is not installed; pip install 'fedsafe[bench]'"
)
needs_psutil = pytest.mark.skipif(
    find_spec("psutil") is None, reason="psutil is not installed; pip install 'fedsafe[bench]'"
)


def last_line(script: str, *arguments: str) -> dict[str, Any]:
    """What a benchmark prints last."""
    finished = run_python(FOLDER / script, "--quick", *arguments)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(finished.stdout.splitlines()[-1])
    assert figures["quick"] is True
    return figures


def forked(
    command: list[str], *, env: dict[str, str], **_: Any
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` does, or torchrun with two ranks, in forks; prints figures alone."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    if command[:5] == [*launcher, "--nproc_per_node=2"]:
        done = run_ranks(*command[5:])
    else:
        assert command[0] == sys.executable
        done = run_python(*command[1:], env=env)
        assert done.returncode == 0, done.stderr
    done.stdout = "\n".join(re.findall(r"^[\d.]+$", done.stdout, flags=re.MULTILINE))
    return done


@pytest.fixture(scope="module")
def throughput() -> dict[str, Any]:
    return last_line("train_throughput.py", "--threads", "1")


@pytest.mark.slow
@needs_peers
def test_throughput_compares_with_the_padded_trainer(throughput: dict[str, Any]) -> None:
    assert throughput["vs_hf_trainer_fp32"] > 0
    assert throughput["bf16_vs_hf_trainer_fp32"] > 0
    assert throughput["tokens_per_second"].keys() >= {"fedsafe", "fedsafe_bf16", "hf_trainer"}
    assert throughput["device"] == "cpu"
    assert throughput["threads"] == 1


@pytest.mark.slow
@needs_peers
def test_throughput_sides_start_from_the_same_loss(throughput: dict[str, Any]) -> None:
    assert throughput["first_loss_difference"] < 1e-3


@pytest.mark.slow
@needs_peers
@needs_trl
def test_throughput_compares_with_trl_packing(throughput: dict[str, Any]) -> None:
    assert throughput["vs_trl_packing_fp32"] > 0
    assert throughput["trl_layout"]


@pytest.mark.slow
def test_round_overhead_says_where_the_time_goes() -> None:
    figures = last_line("round_overhead.py", "--threads", "1")
    assert 0 < figures["overhead_share"] < 1
    assert isinstance(figures["overhead_ms_per_visit"], float)
    assert figures["breakdown_ms"]["forward, backward, optimizer"] > 0
    assert figures["breakdown_ms"]["packing batches"] > 0


@pytest.mark.slow
@needs_psutil
def test_many_clients_measures_planning_and_memory() -> None:
    figures = last_line("many_clients.py")
    assert figures["plan_ms"] > 0
    assert isinstance(figures["rss_growth_mb"], float)
    assert figures["clients"] == 10_000


@pytest.mark.slow
@pytest.mark.distributed
def test_parallel_clients_are_set_beside_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import parallel_clients

    monkeypatch.setattr(parallel_clients.subprocess, "run", forked)
    parallel_clients.main(["--quick"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = figures["clients_per_second"]
    assert rates.keys() == {"clients_in_parallel", "one_process", "one_process_two_threads"}
    assert all(rate > 0 for rate in rates.values())
    ratio = rates["clients_in_parallel"] / rates["one_process"]
    assert figures["vs_one_process"] == pytest.approx(ratio, rel=0.01)


@pytest.mark.slow
@needs_psutil
def test_filter_memory_accounts_for_every_row() -> None:
    figures = last_line("filter_memory.py")
    assert figures["rows_per_second"] > 0
    assert isinstance(figures["rss_growth_mb"], float)
    assert figures["bad"] > 0
    assert figures["unaccounted"] == 0


@pytest.mark.slow
@pytest.mark.real_data
def test_kosbi_guard_is_measured_beside_a_simple_classifier(real_data: Path) -> None:
    figures = last_line("kosbi_guard.py", "--data", str(real_data / "kosbi"))
    assert figures["samples"] == {"train": 200, "measured": 100}
    for judge in ("guard", "tfidf", "majority"):
        assert figures[judge].keys() == {"accuracy", "f1", "auprc"}
        assert all(0 <= value <= 1 for value in figures[judge].values())
    assert figures["majority"]["accuracy"] == 0.46


@pytest.mark.slow
def test_guard_throughput_sides_give_the_same_probabilities() -> None:
    figures = last_line("guard_throughput.py", "--threads", "1")
    for name in ("vs_generate_fp32", "vs_forward_fp32", "bf16_vs_generate_fp32"):
        assert figures[name] > 0
    assert figures["max_relative_diff"] < 1e-4


@pytest.mark.slow
def test_revision_throughput_sides_say_the_same() -> None:
    figures = last_line("revision_throughput.py", "--threads", "1")
    assert figures["identical"] == {"llama": {"global": 1.0, "base": 1.0}}
    for measured in (figures, figures["per_cpu_second"]):
        assert measured["vs_one_by_one"]["llama"].keys() == {"global", "base"}
        assert all(ratio > 0 for ratio in measured["vs_one_by_one"]["llama"].values())


@pytest.mark.slow
def test_evaluation_throughput_sides_find_the_same() -> None:
    figures = last_line("evaluation_throughput.py", "--threads", "1")
    assert figures["identical"] == {"prompts": 1.0, "hhh": 1.0}
    for measured in (figures, figures["per_cpu_second"]):
        assert measured["vs_padded"].keys() == {"prompts", "hhh"}
        assert all(ratio > 0 for ratio in measured["vs_padded"].values())


def test_cai_cost_counts_what_the_cheap_regime_saves() -> None:
    figures = last_line("cai_cost.py", "--pairs", "2000000")  # a hundredth of them: the paper's
    assert figures["cheap_saves_steps_of_one_epoch"] == pytest.approx(0.96)
    costs = figures["costs"]
    assert costs["full"]["steps"] == 50 * 2 * 1250
    assert costs["cheap"]["steps"] == 50 * 50
    assert costs["final"]["steps"] == 2 * 1250
    assert 0.96 < figures["saved"]["cheap"] < 0.99


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    find_spec("flwr") is None, reason="flwr is not installed: pip install 'fedsafe[flower]'"
)
def test_federation_tells_what_flower_adds() -> None:
    figures = last_line("federation.py")
    assert figures["num_nodes"] == 2
    assert 0 <= figures["node_seconds"] <= figures["node_seconds_worst"]
    assert 0 < figures["round_seconds"] <= figures["round_seconds_worst"]
    assert figures["nodes_ready_seconds"] < figures["run_seconds"]
