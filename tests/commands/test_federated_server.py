"""`serve`: the fit of a server, with the options of `fedsafe fit` and its fleet."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from memory_post import MemoryPost, Node
from round_rows import without_seconds
from safetensors.torch import load_file

from fedsafe.cli import main
from fedsafe.commands import federated_server
from fedsafe.commands.client_setup import make_client_trainer
from fedsafe.commands.federated_server import serve
from fedsafe.data.folder_lock import only_here
from fedsafe.federated.remote import reception, visits
from fedsafe.federated.remote.facts import VISIT
from fedsafe.federated.remote.letter import Letter

NO_WAITING = ["--fleet.patience_seconds", "0.2", "--fleet.min_clients", "4"]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reception, visits):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.001)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of which nothing is held out: then clients' samples do not depend on others."""
    settings = yaml.safe_load(config.read_text())
    settings["data"]["validation_share"] = 0.0
    settings["trainer"] |= {"callbacks": None, "accumulate_grad_batches": 2}
    file = tmp_path_factory.mktemp("whole") / "whole.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def clients(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Node]:
    """A node for each client, from the same configuration."""
    folder = tmp_path_factory.mktemp("nodes")
    arguments = ["--config", str(whole), "--run_dir"]
    return {
        number: make_client_trainer(
            [*arguments, str(folder / f"c{number}")], name=f"c{number}"
        ).answer
        for number in range(4)
    }


@pytest.fixture
def server_config(whole: Path, tmp_path: Path) -> Path:
    """The same for a machine that has no conversations and no guard."""
    settings = yaml.safe_load(whole.read_text())
    settings["data"]["path"] = "nowhere/base/clients.jsonl"
    guard = {"format": "world", "model": "nowhere"}
    settings["data"]["filter"] = {
        "guard": {"class_path": "fedsafe.safety.guard_model.GuardModel", "init_args": guard},
        "policy": "refuse",
        "refusals": "nowhere.txt",
    }
    file = tmp_path / "server.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "rounds.jsonl").read_text().splitlines()
    return [without_seconds(json.loads(line)) for line in lines]


def adapter_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def test_a_server_trains_what_a_fit_trains(
    whole: Path, server_config: Path, clients: dict[int, Node], tmp_path: Path
) -> None:
    assert main(["fit", "--config", str(whole), "--run_dir", str(tmp_path / "fit")]) == 0
    run_dir = tmp_path / "server"
    arguments = ["--config", str(server_config), "--run_dir", str(run_dir), *NO_WAITING[:2]]
    arguments += ["--fleet.min_clients", "2", "--config", "configs/federation.yaml"]
    serve([*arguments, "--fleet.clients", '["c0","c1","c2","c3"]'], MemoryPost(clients))
    assert rows_of(run_dir) == rows_of(tmp_path / "fit")
    ours, theirs = adapter_of(run_dir), adapter_of(tmp_path / "fit")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    files = {file.name for file in run_dir.iterdir()}
    assert {"config.yaml", "run.json", "roster.json", "report.html", "metrics.csv"} <= files
    command = json.loads((run_dir / "run.json").read_text())["command"]
    assert command == ["fedsafe", "federate", "server", *arguments, *command[-2:]]
    assert main(["report", str(run_dir)]) == 0
    assert "fedsafe federate server --config" in (run_dir / "report.html").read_text()


def test_a_killed_server_goes_on_with_ckpt_path_last(
    server_config: Path, clients: dict[int, Node], tmp_path: Path
) -> None:
    arguments = ["--config", str(server_config), *NO_WAITING, "--federated.clients_per_round", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    serve([*arguments, "--run_dir", str(whole)], MemoryPost(clients))

    def cut(number: int) -> MemoryPost:
        """A post that fails as the last order of a round is sent."""
        post = MemoryPost(clients)

        def strike(node: int, letter: Letter) -> None:
            if letter.facts["kind"] == VISIT and (letter.facts["round"], node) == (number, 3):
                raise OSError("cut off")

        post.on_send = strike
        return post

    arguments += ["--run_dir", str(killed)]
    with pytest.raises(OSError, match="cut off"):
        serve(arguments, cut(0))
    with pytest.raises(OSError, match="cut off"):
        serve([*arguments, "--ckpt_path", "last"], cut(1))
    serve([*arguments, "--ckpt_path", "last"], MemoryPost(clients))
    assert rows_of(killed) == rows_of(whole)
    ours, theirs = adapter_of(killed), adapter_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="holds another run"):
        serve(arguments, MemoryPost(clients))
    shutil.rmtree(killed / "checkpoints")
    with pytest.raises(ValueError, match="has 2 finished rounds but no checkpoints"):
        serve([*arguments, "--ckpt_path", "last"], MemoryPost(clients))


def test_the_safety_probe_looks_at_the_adapter_after_every_round(
    config: Path, server_config: Path, clients: dict[int, Node], tmp_path: Path
) -> None:
    settings = yaml.safe_load(server_config.read_text())
    settings["trainer"]["callbacks"] = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    server_config.write_text(yaml.safe_dump(settings))
    run_dir = tmp_path / "run"
    arguments = ["--config", str(server_config), "--run_dir", str(run_dir)]
    serve([*arguments, "--fleet.patience_seconds", "1"], MemoryPost(clients))
    assert all("val/prompts/refusal_rate" in row for row in rows_of(run_dir))
    assert not any("val/loss" in row for row in rows_of(run_dir))
    assert (run_dir / "before.json").exists()


REFUSED = {
    "a baseline": (["--federated.mode", "central"], "mode is 'central'; clients on other machines"),
    "fewer than are needed": (
        ["--fleet.min_clients", "3"],
        r"fleet.min_clients is 3, and a round samples 2 \(federated.clients_per_round\)",
    ),
    "a target beyond reach": (
        ["--fleet.target_clients", "3"],
        "fleet.target_clients is 3, and a round samples 2",
    ),
    "several devices": (["--trainer.devices", "2"], "one process on one device, and .* is 2"),
    "several machines": (["--trainer.num_nodes", "2"], r"trainer.num_nodes is 2; set it to 1"),
    "a vocabulary of its own": (
        [
            *("--data.train_tokenizer", "300"),
            *("--model.base", "gpt2"),
            *("--model.from_config", '{"vocab_size": 300, "n_embd": 8, "n_layer": 1, "n_head": 1}'),
        ],
        "train_tokenizer is 300; it is trained on conversations, which stay with the clients",
    ),
    "nobody": ([], "a round needs 2 clients .*no other node has come"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused(server_config: Path, tmp_path: Path, name: str) -> None:
    arguments = ["--config", str(server_config), "--run_dir", str(tmp_path / "run")]
    arguments += ["--fleet.patience_seconds", "0.1", *REFUSED[name][0]]
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        serve(arguments, MemoryPost({}))


def test_a_fit_has_no_fleet(server_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(server_config), "--fleet.min_clients", "1"])
    assert "fleet" in capsys.readouterr().err


def test_two_servers_do_not_share_a_run_directory(
    server_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federated_server, "PATIENCE_SECONDS", 0.0)
    arguments = ["--config", str(server_config), "--run_dir", str(tmp_path)]
    with (
        only_here(tmp_path, who="server", option="--run_dir"),
        pytest.raises(ValueError, match=r"another server is at work in .*, or give .* --run_dir"),
    ):
        serve(arguments, MemoryPost({}))
