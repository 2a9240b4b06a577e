"""A server and three nodes, as a user would start them, beside the same run in one process."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from federate_sides import RecordingProxy, Side, free_port
from safetensors.torch import load_file
from small_miniature import PLANTED, write_settings, write_small_world

from fedsafe.cli import main

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")
pytestmark = [pytest.mark.flower, pytest.mark.slow, pytest.mark.timeout(900)]

CLIENTS = ("client-0", "client-1", "client-2")
PROXIED = CLIENTS[0]


class Ran(NamedTuple):
    """A finished federation."""

    run_dir: Path
    alone: Path
    """Run directory of the same run in one process."""
    nodes: dict[str, Path]
    """Folder of each node."""
    sent: bytes
    """All that one node sent."""
    said: str
    """What the server showed."""
    residents: dict[str, int]
    """Process that trained each client, as it was before the first round."""
    residents_after: dict[str, int]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("federation")
    config = write_settings(folder / "mini.yaml", write_small_world(folder))
    alone = folder / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSAFE_CACHE", str(folder / "cache"))
        assert main(["fit", "--config", str(config), "--run_dir", str(alone)]) == 0
    port = free_port()
    proxy = RecordingProxy(port)
    nodes = {name: folder / "nodes" / name for name in CLIENTS}
    ports = {name: proxy.port if name == PROXIED else port for name in CLIENTS}
    environment = {"FEDSAFE_CACHE": str(folder / "cache")}
    clients = [
        Side(
            [
                *("client", "--config", str(config), "--name", name),
                *("--node_dir", str(nodes[name]), "--server", f"127.0.0.1:{ports[name]}"),
            ],
            folder / f"{name}.log",
            environment,
        )
        for name in CLIENTS
    ]
    arguments = ["--config", str(config), "--run_dir", str(folder / "run")]
    arguments += ["--listen", f"127.0.0.1:{port}", "--fleet.min_clients", "3"]
    sides = [*clients]
    try:
        for client in clients:
            client.wait_for("trains on")
        before = {name: resident_of(node) for name, node in nodes.items()}
        server = Side(["server", *arguments], folder / "server.log", environment)
        sides.append(server)
        status = server.wait()
        assert status == 0, server.text()
        after = {name: resident_of(node) for name, node in nodes.items()}
        said = server.text()
    finally:
        for side in sides:
            side.end()
    return Ran(folder / "run", alone, nodes, bytes(proxy.sent), said, before, after)


def resident_of(node: Path) -> int:
    found = [
        each.pid
        for each in psutil.process_iter(["cmdline"])
        if "fedsafe.federated.flower.resident" in (each.info["cmdline"] or [])
        and any(argument.startswith(str(node)) for argument in each.info["cmdline"])
    ]
    assert len(found) == 1, found
    return found[0]


def rounds_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def without_times(record: Any) -> Any:
    """A record without what depends on the clock."""
    if isinstance(record, dict):
        return {k: without_times(v) for k, v in record.items() if not k.startswith("seconds")}
    if isinstance(record, list):
        return [without_times(each) for each in record]
    return record


def test_the_adapter_is_that_of_the_run_in_one_process(ran: Ran) -> None:
    mine, alone = (load_file(run / "adapter/adapter_model.safetensors") for run in ran[:2])
    assert mine.keys() == alone.keys()
    worst = max((mine[name] - alone[name]).abs().max().item() for name in mine)
    assert worst == 0.0
    assert max(x.abs().max().item() for x in mine.values()) > 0.01


def test_the_records_of_the_rounds_tell_the_same_story(ran: Ran) -> None:
    mine, alone = (without_times(rounds_of(run)) for run in ran[:2])
    assert mine == alone
    assert [len(each["clients"]) for each in mine] == [3, 3]
    assert sum(each["cai"]["sft_steps"] + each["cai"]["dpo_steps"] for each in mine) >= 2
    judged = json.loads((ran.alone / "filter.json").read_text())["total"]
    assert judged["dropped"] > 5  # so the filter had something to do


def test_each_node_judged_its_own_samples_and_keeps_the_verdicts(ran: Ran) -> None:
    counts = json.loads((ran.alone / "filter.json").read_text())["clients"]
    for expected in counts:
        node = ran.nodes[expected["client"]]
        assert json.loads((node / "filter.json").read_text())["clients"] == [expected]
    assert not (ran.run_dir / "filter.jsonl").exists()


def test_nothing_planted_in_the_data_leaves_a_node(ran: Ran) -> None:
    sizes = [each["bytes_up"] // len(CLIENTS) for each in rounds_of(ran.run_dir)]
    assert len(ran.sent) > sum(sizes) > 100_000  # its updates are in it, as they are:
    for expected in (b"lora_A", b'"dtype":"F32"', b"num_answer_tokens", PROXIED.encode()):
        assert expected in ran.sent
    for word in PLANTED:
        assert word.encode() not in ran.sent, word


def test_nothing_planted_in_the_data_is_in_the_servers_files(ran: Ran) -> None:
    files = [file for file in ran.run_dir.rglob("*") if file.is_file()]
    assert len(files) > 5
    for word in (PLANTED[0], PLANTED[1], PLANTED[3]):
        assert not [file.name for file in files if word.encode() in file.read_bytes()]
        assert word not in ran.said


def test_a_node_keeps_one_trainer_and_asks_without_torch(ran: Ran) -> None:
    assert ran.residents == ran.residents_after
    for node in ran.nodes.values():
        assert (node / "supernode.log").read_text().count("fedsafe answered after") == 3
        assert (node / "resident.log").read_text().count("ready:") == 1


def test_no_process_of_a_finished_federation_is_left(ran: Ran) -> None:
    words = [str(ran.run_dir), *map(str, ran.nodes.values())]
    left = [
        each.info["cmdline"]
        for each in psutil.process_iter(["cmdline"])
        if each.pid != os.getpid()
        and any(word in " ".join(each.info["cmdline"] or []) for word in words)
    ]
    assert left == []


def test_only_its_owner_can_read_what_a_node_was_started_with(ran: Ran) -> None:
    for node in ran.nodes.values():
        assert node.stat().st_mode & 0o077 == 0
