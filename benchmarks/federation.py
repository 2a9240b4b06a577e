"""What Flower adds: a server and two nodes on this machine, each as a user would start it.

    .venv/bin/python benchmarks/federation.py [--quick]

`node_seconds`: what the node's process spends on an order beyond training, from the moment that it
holds it until its answer is ready: the way to the resident trainer and back.

`round_seconds`: what a round takes beyond the training of its slowest client. Most of it is Flower
starting a process for each message, and nodes asking for work once a second.

Medians over the rounds behind the first, and the worst; `first_round_seconds` is apart.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from rich.console import Console
from rich.table import Table

CLIENTS = ("client-0", "client-1")
_START_SECONDS = 300.0


def write_task(folder: Path, *, num_rounds: int) -> Path:
    """A configuration over two clients of the miniature, whose base was hardly trained."""
    from fedsafe.world.files import write_world
    from fedsafe.world.pretraining import pretrain
    from fedsafe.world.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    base, world = folder / "pretrained", folder / "world"
    pretrain(tokenizer, seed=0, num_steps=1).save_pretrained(base)
    tokenizer.save_pretrained(base)
    with patch("fedsafe.world.files.pretrained_base", lambda *_, **__: base):
        write_world(world, harm_share=0.2, num_clients=len(CLIENTS), samples_per_client=64, seed=0)
    settings = {
        "rounds": num_rounds,
        "run_dir": str(folder / "run"),
        "model": {"base": str(world / "base"), "rank": 16, "learning_rate": 1e-3},
        "data": {"path": str(world / "clients.jsonl"), "batch_size": 8, "max_length": 128},
        "federated": {"clients_per_round": len(CLIENTS), "local_steps": 10},
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
    }
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """One side of the federation."""
    with log.open("wb") as written:
        return subprocess.Popen(
            [sys.executable, "-m", "fedsafe", "federate", *arguments],
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def run(folder: Path, *, num_rounds: int) -> dict[str, float]:
    """Run the federation; returns the seconds until nodes and server were ready."""
    config = str(write_task(folder, num_rounds=num_rounds))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    begun = time.monotonic()
    logs = {name: folder / f"{name}.log" for name in CLIENTS}
    nodes = [
        start(
            [
                *("client", "--config", config, "--name", name),
                *("--server", address, "--node_dir", str(folder / name)),
            ],
            log,
        )
        for name, log in logs.items()
    ]
    try:
        for log in logs.values():
            _wait_for("trains on", log)
        warm = time.monotonic() - begun
        arguments = ["server", "--config", config, "--listen", address]
        server = start([*arguments, "--fleet.min_clients", "2"], folder / "server.log")
        status = server.wait()
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait()
    if status:
        raise SystemExit((folder / "server.log").read_text())
    return {"nodes_ready": warm, "all": time.monotonic() - begun}


def _wait_for(words: str, log: Path) -> None:
    until = time.monotonic() + _START_SECONDS
    while words not in log.read_text():
        if time.monotonic() > until:
            raise SystemExit(log.read_text())
        time.sleep(0.1)


def node_overheads(folder: Path) -> list[float]:
    """Seconds of each order beyond training, the first of each node left out."""
    found = []
    for name in CLIENTS:
        said = (folder / name / "supernode.log").read_text()
        trained = (folder / name / "resident.log").read_text()
        answered = [float(x) for x in re.findall(r"fedsafe answered after ([\d.]+) s", said)]
        seconds = [float(x) for x in re.findall(r"answered: visit, ([\d.]+) s", trained)]
        visits = answered[-len(seconds) :]  # before them a greeting
        found += [a - s for a, s in zip(visits, seconds, strict=True)][1:]
    return found


def round_overheads(folder: Path) -> list[float]:
    """Seconds of each round beyond the training of its slowest client."""
    rounds = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").open()]
    return [each["seconds"] - max(c["seconds"] for c in each["clients"]) for each in rounds]


def measure(*, quick: bool) -> dict[str, Any]:
    """Run it once and read its logs."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ready = run(folder, num_rounds=2 if quick else 8)
        nodes, (first, *later) = node_overheads(folder), round_overheads(folder)
    return {
        "node_seconds": statistics.median(nodes),
        "node_seconds_worst": max(nodes),
        "round_seconds": statistics.median(later),
        "round_seconds_worst": max(later),
        "first_round_seconds": first,
        "nodes_ready_seconds": ready["nodes_ready"],
        "run_seconds": ready["all"],
    }


def main() -> None:
    """Measure, print a table, and last a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds in place of 8")
    quick = parser.parse_args().quick
    figures = measure(quick=quick)
    table = Table("what", "seconds", title=f"Flower's costs, {len(CLIENTS)} nodes")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}")
    Console().print(table)
    print(json.dumps({**figures, "num_nodes": len(CLIENTS), "quick": quick}))


if __name__ == "__main__":
    main()
