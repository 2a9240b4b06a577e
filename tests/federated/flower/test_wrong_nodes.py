"""Nodes that send what no server should take, and one that is killed: the run goes on without them.

The nodes are stand-ins without a trainer, so that what they send is exactly known.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from federate_sides import HERE, Side, all_gone, free_port
from safetensors.torch import load_file
from small_miniature import write_settings, write_small_world

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")
pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_ROUNDS = 9
STEP = 0.001
NAMES = ("ada", "cyd", "mal")
STAND_IN = {"PYTHONPATH": f"{HERE / 'flower_node'}:{HERE}"}


class Ran(NamedTuple):
    """A finished run, and what was killed in it."""

    run_dir: Path
    rounds: list[dict[str, Any]]
    said: str
    killed: psutil.Process
    cyd_said: str
    orphans_ended: bool


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("wrong")
    config = settings(folder)
    port = free_port()
    sides = {name: node(folder, config, name, port) for name in NAMES}
    arguments = ["--config", str(config), "--run_dir", str(folder / "run")]
    arguments += ["--listen", f"127.0.0.1:{port}", "--fleet.min_clients", "1"]
    arguments += ["--fleet.clients", json.dumps(NAMES)]
    arguments += ["--fleet.deadline_seconds", "30", "--fleet.grace_seconds", "20"]
    server = Side(["server", *arguments], folder / "server.log")
    try:
        killed = kill_in_its_third_round(sides["cyd"], folder / "cyd", server)
        assert server.wait() == 0, server.text()
        family = sides["ada"].family()
        sides["ada"].process.kill()
        orphans_ended = all_gone(family, 20)
        said = sides["cyd"].text()
    finally:
        for side in (server, *sides.values()):
            side.end()
    rounds = [json.loads(line) for line in (folder / "run/rounds.jsonl").open()]
    return Ran(folder / "run", rounds, server.text(), killed, said, orphans_ended)


def settings(folder: Path) -> Path:
    world = write_small_world(folder)
    given = {"batch_size": 4, "max_length": 64, "path": str(world / "clients.jsonl")}
    config = write_settings(
        folder / "mini.yaml",
        world,
        rounds=NUM_ROUNDS,
        data=given,
        federated={"clients_per_round": 3, "local_steps": 3},
    )
    (folder / "facts.json").write_text(json.dumps(honest_facts(config)))
    return config


def honest_facts(config: Path) -> dict[str, Any]:
    """What a node with this configuration says of itself."""
    from fedsafe.commands.client_setup import make_client_trainer
    from fedsafe.federated.remote.facts import Greeting

    arguments = ["--config", str(config), "--run_dir", str(config.parent / "facts")]
    trainer = make_client_trainer(arguments, name="client-0")
    return dict(trainer.answer(Greeting(run="").letter()).facts)


def node(folder: Path, config: Path, name: str, port: int) -> Side:
    arguments = ["client", "--name", name, "--server", f"127.0.0.1:{port}"]
    arguments += ["--node_dir", str(folder / name), "--facts", str(folder / "facts.json")]
    return Side(arguments, folder / f"{name}.log", STAND_IN)


def kill_in_its_third_round(client: Side, folder: Path, server: Side) -> psutil.Process:
    """SIGKILL the SuperNode of a client that is in the middle of a visit."""
    for _ in range(1200):
        if (folder / "hangs").exists():
            break
        assert server.process.poll() is None, server.text()
        time.sleep(0.1)
    supernode = client.find("fedsafe.federated.flower.supernode")
    supernode.kill()
    return supernode


def visit(ran: Ran, round_number: int, client: str) -> dict[str, Any]:
    visits = ran.rounds[round_number]["clients"]
    return next(each for each in visits if each["client"] == client)


@pytest.mark.parametrize(
    ("round_number", "reason"),
    [
        (1, "are not finite"),
        (2, "is of shape"),
        (3, "is of type I32; agreed was F32"),
        (4, "bytes"),
        (5, "ticket|round"),
    ],
    ids=["not-a-number", "another-shape", "another-type", "ten-times-the-size", "old-update"],
)
def test_what_no_server_should_take_is_left_out_and_named(
    round_number: int, reason: str, ran: Ran
) -> None:
    record = visit(ran, round_number, "mal")
    assert record["status"] == "refused"
    assert any(each in record["reason"] for each in reason.split("|")), record
    assert f"round {round_number + 1}: mal refused: {record['reason']}" in ran.said


def test_the_run_goes_on_to_its_end_without_them(ran: Ran) -> None:
    assert len(ran.rounds) == NUM_ROUNDS
    for number, record in enumerate(ran.rounds):
        accepted = {each["client"] for each in record["clients"] if each["status"] == "ok"}
        assert "ada" in accepted
        assert ("mal" in accepted) == (number not in range(1, 6)), record


def test_the_adapter_holds_what_was_accepted_and_nothing_else(ran: Ran) -> None:
    adapter = load_file(ran.run_dir / "adapter/adapter_model.safetensors")
    for name, value in adapter.items():
        assert value.isfinite().all(), name
        if "lora_B" in name:  # zero at the start, and each accepted update adds the same
            assert (value - NUM_ROUNDS * STEP).abs().max() < 1e-6, name


def test_a_round_goes_on_without_a_killed_node_which_rejoins(ran: Ran) -> None:
    lost = visit(ran, 2, "cyd")
    assert lost["status"] in ("late", "failed")
    assert lost["reason"]
    assert visit(ran, 1, "cyd")["status"] == "ok"
    assert visit(ran, NUM_ROUNDS - 1, "cyd")["status"] == "ok"
    assert not ran.killed.is_running()
    assert ran.cyd_said.count("cyd takes part") == 2


def test_nothing_outlives_a_client_that_is_killed(ran: Ran) -> None:
    assert ran.orphans_ended


def test_a_node_answers_without_torch() -> None:
    """The process that Flower starts for each message loads nothing that takes long."""
    code = (
        "import sys, fedsafe.federated.flower.client_app as app; "
        "print([m for m in ('torch', 'lightning', 'transformers', 'peft') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
