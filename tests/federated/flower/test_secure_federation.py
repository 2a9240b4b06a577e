"""TLS and node keys; a server that is killed and started again."""

import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from certificates import write_certificates, write_node_key
from federate_sides import HERE, Side, all_gone, free_port
from safetensors.torch import load_file
from small_miniature import write_settings, write_small_world

from fedsafe.cli import main

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")
pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.timeout(900)]

CLIENTS = ("client-0", "client-1")
STAND_IN = {"PYTHONPATH": f"{HERE / 'flower_node'}:{HERE}"}


class Ran(NamedTuple):
    """A federation whose server was killed after its first round, and started again."""

    run_dir: Path
    alone: Path
    """Run directory of the same run in one process."""
    family_ended: bool
    """Whether all that the killed server had started ended with it."""
    refused: dict[str, tuple[int, str]]
    """Exit status and words of clients that should not be let in."""
    clients: dict[str, str]
    """What those that were let in said."""
    told: str
    """What the server said before it was killed."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("secure")
    config = settings(folder)
    alone = folder / "alone"
    assert main(["fit", "--config", str(config), "--run_dir", str(alone)]) == 0
    certificates = write_certificates(folder / "certificates")
    port = free_port()
    arguments = ["server", "--config", str(config), "--run_dir", str(folder / "run")]
    arguments += ["--listen", f"127.0.0.1:{port}", "--certificates", str(certificates)]
    arguments += ["--node_keys", str(keys(folder))]
    clients = {name: client(folder, config, name, port) for name in CLIENTS}
    (folder / "left").mkdir()  # for what a killed server cannot remove
    server = Side(arguments, folder / "server.log", {"TMPDIR": str(folder / "left")})
    strangers = {
        "unknown key": stranger(folder, "eve", port, "--key", str(folder / "eve")),
        "no key": stranger(folder, "fay", port),
    }
    impostor = stranger(folder, CLIENTS[0], port, "--key", str(folder / "gus"), home="gus")
    sides = [server, *clients.values(), *strangers.values(), impostor]
    try:
        refused = {name: (each.wait(), each.text()) for name, each in strangers.items()}
        wait_for_rounds(folder / "run", 1, server)
        told = server.text()
        family = server.family()
        server.process.kill()
        family_ended = all_gone(family, 20)
        sides.append(Side([*arguments, "--ckpt_path", "last"], folder / "again.log"))
        assert sides[-1].wait() == 0, sides[-1].text()
        said = {name: each.text() for name, each in clients.items()}
    finally:
        for side in sides:
            side.end()
    return Ran(folder / "run", alone, family_ended, refused, said, told)


def settings(folder: Path) -> Path:
    world = write_small_world(folder)
    rows = (world / "clients.jsonl").read_text().splitlines()
    two = [row for row in rows if json.loads(row)["client"] in CLIENTS]
    (world / "two.jsonl").write_text("\n".join(two) + "\n")
    data = {"batch_size": 4, "max_length": 64, "validation_share": 0.0, "partition": "Natural"}
    return write_settings(
        folder / "mini.yaml",
        world,
        rounds=3,
        data={**data, "path": str(world / "two.jsonl")},
        federated={"clients_per_round": 2, "local_steps": 3},
    )


def keys(folder: Path) -> Path:
    """The public keys that the server knows."""
    known = folder / "known"
    known.mkdir()
    for name in (*CLIENTS, "eve", "gus"):
        write_node_key(folder / name)
        if name != "eve":
            shutil.copy(folder / f"{name}.pub", known)
    return known


def client(folder: Path, config: Path, name: str, port: int) -> Side:
    arguments = ["client", "--name", name, "--server", f"127.0.0.1:{port}"]
    arguments += ["--root_certificate", str(folder / "certificates/ca.crt")]
    arguments += ["--key", str(folder / name), "--node_dir", str(folder / "nodes" / name)]
    return Side([*arguments, "--config", str(config)], folder / f"{name}.log")


def stranger(folder: Path, name: str, port: int, *others: str, home: str | None = None) -> Side:
    """A client without a trainer, as none is needed to be refused."""
    home = home or name
    (folder / f"{home}.json").write_text(json.dumps(FACTS))
    arguments = ["client", "--name", name, "--server", f"127.0.0.1:{port}", *others]
    arguments += ["--root_certificate", str(folder / "certificates/ca.crt")]
    arguments += ["--node_dir", str(folder / "nodes" / home)]
    return Side(
        [*arguments, "--facts", str(folder / f"{home}.json")], folder / f"{home}.log", STAND_IN
    )


FACTS = {
    "kind": "hello",
    "num_samples": 1,
    "num_answer_tokens": 1,
    "filtered": {},
    "settings": {},
    "versions": {},
}


def wait_for_rounds(run_dir: Path, number: int, server: Side) -> None:
    until = time.monotonic() + 300
    while len(rounds_of(run_dir)) < number or not list(run_dir.glob("checkpoints/*")):
        assert server.process.poll() is None, server.text()
        assert time.monotonic() < until, server.text()
        time.sleep(0.1)


def rounds_of(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "rounds.jsonl"
    return [json.loads(line) for line in file.open()] if file.exists() else []


def test_a_killed_server_goes_on_to_the_adapter_of_the_run_in_one_process(ran: Ran) -> None:
    mine, alone = (load_file(run / "adapter/adapter_model.safetensors") for run in ran[:2])
    assert mine.keys() == alone.keys()
    for name, value in mine.items():
        assert torch.equal(value, alone[name]), name


def test_a_killed_server_has_each_round_once(ran: Ran) -> None:
    mine, alone = rounds_of(ran.run_dir), rounds_of(ran.alone)
    assert [each["round"] for each in mine] == [1, 2, 3]
    for ours, other in zip(mine, alone, strict=True):
        assert ours["loss"] == other["loss"]
        assert {each["status"] for each in ours["clients"]} == {"ok"}


def test_nothing_outlives_a_server_that_is_killed(ran: Ran) -> None:
    assert ran.family_ended


def test_nodes_come_back_to_a_server_that_comes_back(ran: Ran) -> None:
    for name, said in ran.clients.items():
        assert said.count(f"{name} takes part at") == 2, said
        assert "does not answer any more" in said


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("unknown key", "does not know the key of this node; add"),
        ("no key", "admits nodes by their keys; give this node's, --key"),
    ],
)
def test_a_node_that_is_not_registered_is_told_so_in_one_line(
    which: str, words: str, ran: Ran
) -> None:
    status, said = ran.refused[which]
    assert status == 1
    complaints = [line for line in said.splitlines() if line.startswith("fedsafe federate:")]
    assert len(complaints) == 1
    assert words in complaints[0]
    assert "Traceback" not in said


def test_a_registered_node_cannot_take_anothers_name(ran: Ran) -> None:
    assert "is refused: it calls itself client-0, and its key is gus's" in ran.told
    assert all(each["status"] == "ok" for row in rounds_of(ran.run_dir) for each in row["clients"])
