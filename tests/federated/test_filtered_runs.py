"""Runs behind the safety filter."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from warm import run_python
from word_guard import WordGuard

from fedsafe.federated.client_drift import Scaffold
from fedsafe.federated.round_log import RoundLog
from fedsafe.safety.filter import SafetyFilter

FederationMaker = Callable[..., Any]

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:.*no sample left"),
]


def filtered(word: str | None, policy: str = "drop", **settings: Any) -> dict[str, Any]:
    """Settings of the data, with a guard that finds `word`."""
    rule = SafetyFilter(WordGuard(word), policy=policy, max_unsafe_share=1.0, **settings)
    return {"filter": rule}


@pytest.mark.parametrize("policy", ["drop", "refuse", "keep"])
def test_a_guard_that_calls_everything_safe_changes_nothing(
    federation: FederationMaker, policy: str
) -> None:
    settings = {"model": {"lora_dropout": 0.2}, "data": {"validation_share": 0.1}}
    off = federation("off", **settings).fit()
    settings["data"] |= filtered(None, policy)
    on = federation("on", **settings).fit()
    assert torch.equal(on.adapter, off.adapter)
    assert on.rows == off.rows
    assert len((on.folder / "filter.jsonl").read_text().splitlines()) == 26
    assert not (off.folder / "filter.jsonl").exists()


@pytest.mark.parametrize("policy", ["drop", "refuse"])
def test_a_guard_that_finds_something_changes_the_adapter(
    federation: FederationMaker, policy: str
) -> None:
    off, on = federation("off").fit(), federation("on", data=filtered("red", policy)).fit()
    assert not torch.equal(on.adapter, off.adapter)


@pytest.fixture
def one_empty(tmp_path: Path) -> dict[str, Any]:
    """Settings of a federation whose filter leaves its second of four clients nothing."""
    rows = [
        {"prompt": f"say {n}", "response": "red" if name == "bob" else "sky", "client": name}
        for name in ("ada", "bob", "cyd", "dee")
        for n in range(5)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(file), **filtered("red")}


@pytest.mark.parametrize(
    "rounds",
    [
        {"clients_per_round": 3},
        {"clients_per_round": 1.0, "local_epochs": 1},
        {"clients_per_round": 3, "weighting": "tokens", "client_drift": Scaffold()},
        {"clients_per_round": 3, "mode": "local"},
    ],
    ids=["fedavg", "share", "scaffold", "local"],
)
def test_a_client_without_samples_takes_no_part(
    federation: FederationMaker, one_empty: dict[str, Any], rounds: dict[str, Any]
) -> None:
    run = federation(data=one_empty, rounds=rounds).fit()
    for row in run.rows:
        assert [client["client"] for client in row["clients"]] == ["ada", "cyd", "dee"]


def test_scaffold_counts_the_clients_that_hold_samples(
    federation: FederationMaker, one_empty: dict[str, Any], tmp_path: Path
) -> None:
    """A federation of three is a federation of four, one of whom has nothing."""
    three = tmp_path / "three.jsonl"
    lines = Path(one_empty["path"]).read_text().splitlines(keepends=True)
    three.write_text("".join(line for line in lines if "bob" not in line))
    # the clients' numbers decide their batches; with one batch each, the order is all that differs
    rounds = {"clients_per_round": 3, "client_drift": Scaffold()}
    settings = {"model": {"optimizer": "sgd", "learning_rate": 0.1}, "rounds": rounds}
    full = {"batch_size": 5}
    few = federation("three", data={"path": str(three), **full}, **settings).fit()
    many = federation("four", data=one_empty | full, **settings).fit()
    torch.testing.assert_close(many.adapter, few.adapter, atol=1e-6, rtol=0)
    assert (many.adapter - many.start).norm() > 1e-2


def test_the_mean_of_everyones_steps_leaves_the_empty_out(
    federation: FederationMaker, one_empty: dict[str, Any]
) -> None:
    rounds = {"mode": "central", "clients_per_round": 3, "local_epochs": 1}
    run = federation(data=one_empty, rounds=rounds).fit()
    assert [row["clients"][0]["steps"] for row in run.rows] == [6, 6]  # 3 clients, 5 samples by 3
    assert [row["clients"][0]["samples"] for row in run.rows] == [15, 15]


def test_more_clients_than_hold_samples_cannot_be_sampled(
    federation: FederationMaker, one_empty: dict[str, Any]
) -> None:
    run = federation(data=one_empty, rounds={"clients_per_round": 4})
    message = "clients_per_round is 4, but the safety filter leaves 3 of 4 clients a sample"
    with pytest.raises(ValueError, match=message):
        run.fit()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            filtered("red", threshold=0.6),
            "'drop, pair, threshold 0.5, .* is 'drop, pair, .* 0.6",
        ),
        (filtered("red", "keep"), "data.filter was 'drop, .* and is 'keep, "),
        (filtered("blue"), r"word-guard \w{12}' and is 'drop.*word-guard \w{12}'"),
        ({}, "data.filter was 'drop, pair, threshold 0.5, word-guard .* and is None"),
    ],
    ids=["threshold", "policy", "guard", "off"],
)
@pytest.mark.filterwarnings("ignore:.*is judged anew")
def test_a_run_may_not_go_on_behind_another_filter(
    federation: FederationMaker, other: dict[str, Any], message: str
) -> None:
    run = federation(data=filtered("red")).fit()
    run.trainer.save_checkpoint(run.folder / "a.ckpt")
    before = (run.folder / "filter.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        federation(data=other).fit(ckpt_path=run.folder / "a.ckpt")
    assert (run.folder / "filter.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_filtered_run_killed_in_its_scan_and_in_training_is_the_run_that_never_was(
    tiny_gpt2: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(folder: str, *options: str) -> int:
        monkeypatch.setenv("FEDSAFE_CACHE", str(tmp_path / f"cache of {folder}"))
        arguments = [tiny_gpt2, conversations, tmp_path / folder, *options]
        script = Path(__file__).with_name("killed_run.py")
        return run_python(script, "--filter", "red", *arguments).returncode

    assert train("whole") == 0
    assert train("killed", "--kill-scan", "2") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "filter.jsonl").exists()
    assert train("killed", "--kill-at", "7") == -signal.SIGKILL
    assert train("killed", "--resume") == 0
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    for file in ("filter.jsonl", "adapter/adapter_model.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    rows = [
        [{**row, "seconds": None} for row in RoundLog(folder / "rounds.jsonl").read()]
        for folder in (killed, whole)
    ]
    assert rows[0] == rows[1]
    assert "refused" in (whole / "filter.jsonl").read_text()
