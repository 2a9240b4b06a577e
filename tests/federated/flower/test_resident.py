"""Resident trainers with a real, tiny model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from federations import write_conversations
from torch import Tensor

from fedsafe.commands.client_setup import make_client_trainer
from fedsafe.federated.flower import resident
from fedsafe.federated.flower.node_file import Node
from fedsafe.federated.flower.private_line import folder_for
from fedsafe.federated.flower.resident_call import (
    CANNOT_START,
    ask,
    stop,
    warm_up,
)
from fedsafe.federated.remote.facts import Greeting, VisitOrder, VisitReport
from fedsafe.federated.remote.letter import Letter
from fedsafe.federated.remote.tensors import pack_adapter, unpack_adapter
from fedsafe.model.flat_adapter import FlatAdapter
from fedsafe.model.module import LoraLM

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAND_INS = Path(__file__).parents[2] / "stand_ins"
STRATEGIES = Path(__file__).parents[3] / "configs" / "strategy"
CONFIG = """
run_dir: nobody-writes-here
rounds: 2
model: {{base: {base}, rank: 4, alpha: 8, learning_rate: 1.0e-2, lora_dropout: 0.1}}
data:
  path: rows.jsonl
  batch_size: 4
  validation_share: 0.2
  filter: {{guard: {{class_path: word_guard.WordGuard, init_args: {{word: sun}}}}}}
federated: {{local_steps: 3, client_drift: Scaffold}}
trainer: {{accelerator: cpu}}
"""


@pytest.fixture(scope="module")
def site(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A node's machine: its rows, a configuration, a cache of its own."""
    folder = tmp_path_factory.mktemp("site")
    write_conversations(folder / "rows.jsonl")
    (folder / "all.yaml").write_text(CONFIG.format(base=tiny_gpt2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(STAND_INS))
        patch.setenv("FEDSAFE_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


def set_up(site: Path, name: str, *arguments: str, num_ranks: int = 1) -> Path:
    """A node of the client `ada`; returns its file."""
    folder = site / name
    folder.mkdir(exist_ok=True)
    given = ["--config", "all.yaml", *arguments]
    Node("ada", given, cwd=str(site), num_ranks=num_ranks).write(folder / "node.json")
    return folder / "node.json"


@pytest.fixture(scope="module")
def node_file(site: Path) -> Iterator[Path]:
    """A node with one process."""
    file = set_up(site, "one")
    yield file
    stop(file)


@pytest.fixture(scope="module")
def two_ranks(site: Path) -> Iterator[Path]:
    """A node whose client two processes train together."""
    file = set_up(site, "two", "--config", str(STRATEGIES / "ddp.yaml"), num_ranks=2)
    yield file
    stop(file)


@pytest.fixture(scope="module")
def adapter(tiny_gpt2: Path) -> FlatAdapter:
    module = LoraLM(base=str(tiny_gpt2), rank=4, alpha=8.0)
    module.configure_model()
    return module.flat_adapter()


@pytest.fixture(scope="module")
def order(adapter: FlatAdapter) -> Letter:
    """An order to train."""
    facts = VisitOrder(
        run="r",
        ticket="t",
        round=1,
        num_rounds=2,
        client=3,
        name="ada",
        number=0,
        encoding="float32",
        validate=True,
    )
    start = adapter.read()
    sent = {"shift": torch.full_like(start, 0.001)}
    return facts.letter(pack_adapter(adapter, start, sent, encoding="float32"))


def here(site: Path, order: Letter, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> Letter:
    """The answer of a node in this process."""
    monkeypatch.chdir(site)
    given = ["--config", "all.yaml", *arguments, "--run_dir", "here"]
    return make_client_trainer(given, name="ada").answer(order)


def values(adapter: FlatAdapter, letter: Letter) -> tuple[Tensor, Tensor]:
    """The adapter and the gradient that an answer holds."""
    vector, others = unpack_adapter(adapter, letter.tensors, ["mean_gradient"], encoding="float32")
    return vector, others["mean_gradient"]


def timeless(letter: Letter) -> dict[str, object]:
    return {**letter.facts, "seconds": 0}


def test_its_answers_are_those_of_a_node_in_this_process(
    site: Path, node_file: Path, order: Letter, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = warm_up(node_file)
    assert (facts.client, facts.num_samples) == ("ada", facts.filtered["left"])
    first, again = (ask(node_file, order, timeout_seconds=100) for _ in range(2))
    expected = here(site, order, monkeypatch=monkeypatch)
    assert expected.facts["kind"] == "visit"
    assert first.tensors == again.tensors == expected.tensors
    assert timeless(first) == timeless(again) == timeless(expected)


def test_its_files_are_in_the_folder_of_the_node(site: Path, node_file: Path) -> None:
    warm_up(node_file)
    found = {each.name for each in node_file.parent.iterdir()}
    assert found == {"node.json", "resident.log", "filter.jsonl", "filter.json"}
    assert not (site / "nobody-writes-here").exists()


def test_killed_in_a_visit_it_is_started_anew_with_the_same_answer(
    node_file: Path, order: Letter
) -> None:
    expected = ask(node_file, order, timeout_seconds=100)
    process = int((folder_for(node_file) / "pid").read_text())
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fedsafe.federated.flower.resident_call import ask\n"
        "from fedsafe.federated.remote.letter import Letter\n"
        "letter = Letter.from_bytes(sys.stdin.buffer.read())\n"
        f"given = ask(Path({str(node_file)!r}), letter, timeout_seconds=200)\n"
        "assert not {'torch', 'numpy', 'lightning'} & set(sys.modules)\n"
        "sys.stdout.buffer.write(given.to_bytes())\n"
    )
    os.kill(process, signal.SIGSTOP)  # it cannot have finished when it is killed
    asking = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert asking.stdin is not None
    asking.stdin.write(order.to_bytes())
    asking.stdin.close()
    time.sleep(1.5)
    os.kill(process, signal.SIGKILL)
    assert asking.stdout is not None
    given = Letter.from_bytes(asking.stdout.read())
    assert asking.wait() == 0
    assert int((folder_for(node_file) / "pid").read_text()) != process
    assert given.tensors == expected.tensors
    assert timeless(given) == timeless(expected)


def test_asking_costs_little_beyond_the_training(node_file: Path, order: Letter) -> None:
    warm_up(node_file)
    beyond = []
    for _ in range(7):
        started = time.perf_counter()
        report = VisitReport.read(ask(node_file, order, timeout_seconds=100).facts)
        beyond.append(time.perf_counter() - started - report.seconds)
    assert min(beyond) < 0.05


def test_a_node_that_cannot_start_says_what_is_wrong_in_one_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(site)
    monkeypatch.setattr(resident, "_set_up_log", lambda ranks: None)  # this process has its own
    node_file = set_up(site, "wrong", "--model.rank", "many")  # told in several lines
    assert resident.main(node_file) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f'{CANNOT_START}Parser key "model.rank": Expected a')
    assert said.count("many") == 1


def test_two_ranks_train_what_one_trains_in_two_parts(
    site: Path,
    two_ranks: Path,
    adapter: FlatAdapter,
    order: Letter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, again = (ask(two_ranks, order, timeout_seconds=200) for _ in range(2))
    assert first.tensors == again.tensors
    expected = here(site, order, "--trainer.accumulate_grad_batches", "2", monkeypatch=monkeypatch)
    for given, known in zip(values(adapter, first), values(adapter, expected), strict=True):
        torch.testing.assert_close(given, known, rtol=0, atol=1e-6)
    reports = [VisitReport.read(letter.facts) for letter in (first, expected)]
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-6)
    assert reports[0].start_nll == pytest.approx(reports[1].start_nll, rel=1e-6)
    assert reports[0].num_tokens == reports[1].num_tokens
    assert reports[0].start_tokens == reports[1].start_tokens > 0
    lines = (two_ranks.parent / "filter.jsonl").read_text().splitlines()
    assert len(lines) == 9  # one rank writes


def test_two_ranks_that_hold_the_base_together_train_the_same(
    site: Path, adapter: FlatAdapter, order: Letter, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = set_up(site, "split", "--config", str(STRATEGIES / "fsdp.yaml"), num_ranks=2)
    try:
        assert warm_up(split).settings["model.base"] is None
        given = [ask(split, order, timeout_seconds=200) for _ in range(3)]
    finally:
        stop(split)
    expected = here(site, order, "--trainer.accumulate_grad_batches", "2", monkeypatch=monkeypatch)
    assert given[0].tensors == given[1].tensors == given[2].tensors
    for one, other in zip(values(adapter, given[0]), values(adapter, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for fact in ("loss", "start_nll"):
        assert given[0].facts[fact] == pytest.approx(expected.facts[fact], rel=1e-6)


def test_an_order_that_is_refused_does_not_part_the_ranks(two_ranks: Path, order: Letter) -> None:
    refused = ask(two_ranks, order._replace(tensors=b"short"), timeout_seconds=200)
    assert refused.facts == {"kind": "failure", "error": "RefusedUpdateError"}
    process = (folder_for(two_ranks) / "pid").read_text()
    assert ask(two_ranks, order, timeout_seconds=200).facts["kind"] == "visit"
    assert (folder_for(two_ranks) / "pid").read_text() == process


def test_a_rank_that_dies_takes_the_others_along_and_all_are_started_anew(
    two_ranks: Path, order: Letter
) -> None:
    expected = ask(two_ranks, order, timeout_seconds=200)
    launcher = int((folder_for(two_ranks) / "pid").read_text())
    ranks = [int(n) for n in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert ask(two_ranks, order, timeout_seconds=200).tensors == expected.tensors
    assert not any(Path(f"/proc/{process}").exists() for process in ranks)


def test_a_greeting_is_answered_by_all_ranks_at_once(two_ranks: Path) -> None:
    facts = ask(two_ranks, Greeting("r").letter(), timeout_seconds=200).facts
    assert facts["client"] == "ada"
