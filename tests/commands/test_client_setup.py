import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from federations import write_conversations

from fedsafe.commands.client_setup import make_client_trainer
from fedsafe.federated.remote.client_trainer import ClientTrainer
from fedsafe.federated.remote.facts import Greeting, NodeFacts

NodeMaker = Callable[..., ClientTrainer]

pytestmark = pytest.mark.usefixtures("own_cache")

SERVERS_OWN = {
    "run_dir": "runs/server",
    "rounds": 5,
    "fleet": {"min_clients": 2, "encoding": "bfloat16"},
    "data": {
        "partition": "Natural",
        "cai": {"prompts": "nowhere.jsonl"},
        "benchmarks": [
            {
                "class_path": "fedsafe.evaluation.prompts.Prompts",
                "init_args": {"name": "red_team", "path": "nowhere-either.jsonl"},
            }
        ],
    },
    "federated": {"clients_per_round": 3, "server_optimizer": "FedAdam", "cai": {}},
    "checkpoint": {"every_n_steps": 7},
    "trainer": {
        "callbacks": [
            {
                "class_path": "fedsafe.evaluation.safety_probe.SafetyProbe",
                "init_args": {
                    "benchmarks": [
                        {
                            "class_path": "fedsafe.evaluation.prompts.Prompts",
                            "init_args": {"name": "red_team", "path": "nowhere-either.jsonl"},
                        }
                    ]
                },
            }
        ],
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "nowhere"}},
        "check_val_every_n_epoch": 2,
    },
}
"""Settings of which nothing is needed on a node, nor would be found there."""


@pytest.fixture
def config(tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration for a fit; the test is in the folder of its data."""
    monkeypatch.chdir(tmp_path)
    write_conversations(tmp_path / "rows.jsonl")
    return {
        "seed_everything": 4,
        "model": {"base": str(tiny_gpt2), "rank": 4, "learning_rate": 0.01},
        "data": {"path": "rows.jsonl", "batch_size": 3, "validation_share": 0.0},
        "federated": {"local_steps": 2, "client_drift": {"class_path": "FedProx"}},
        "trainer": {"accelerator": "cpu", "gradient_clip_val": 0.5},
    }


@pytest.fixture
def node(config: dict[str, Any]) -> NodeMaker:
    """Make the node of `ada` from the configuration and further options."""

    def make(*options: str, name: str = "ada", **parts: Any) -> ClientTrainer:
        Path("a.yaml").write_text(yaml.safe_dump(config))
        Path("b.yaml").write_text(yaml.safe_dump(parts))
        given = ["--config", "a.yaml", "--config", "b.yaml", "--run_dir", "node", *options]
        return make_client_trainer(given, name=name)

    return make


def facts_of(trainer: ClientTrainer) -> NodeFacts:
    return NodeFacts.read(trainer.answer(Greeting("r").letter()).facts)


def test_the_options_of_a_fit_make_a_node(node: NodeMaker) -> None:
    facts = facts_of(node("--data.batch_size", "4"))
    assert (facts.client, facts.num_samples) == ("ada", 9)
    expected = {
        "model.rank": 4,
        "model.learning_rate": 0.01,
        "data.batch_size": 4,
        "federated.local_steps": 2,
        "federated.client_drift": "FedProx",
        "trainer.gradient_clip_val": 0.5,
        "seed_everything": 4,
    }
    assert expected.items() <= facts.settings.items()


def test_what_only_the_server_needs_need_not_be_there(node: NodeMaker) -> None:
    plain, shared = facts_of(node()), facts_of(node(**SERVERS_OWN))
    assert shared == plain
    assert not Path("runs").exists()


def test_its_folder_is_used_again_and_holds_what_the_filter_said(node: NodeMaker) -> None:
    guard = {"class_path": "word_guard.WordGuard", "init_args": {"word": "sun"}}
    for _ in range(2):
        facts = facts_of(node(data={"filter": {"guard": guard}}))
        lines = Path("node/filter.jsonl").read_text().splitlines()
        assert len(lines) == facts.filtered["judged"] == 9
        assert {json.loads(line)["client"] for line in lines} == {"ada"}
        assert {each.name for each in Path("node").iterdir()} == {"filter.jsonl", "filter.json"}


def test_a_run_of_the_server_in_its_folder_is_no_hindrance(node: NodeMaker) -> None:
    Path("node/checkpoints").mkdir(parents=True)
    assert facts_of(node()).num_samples == 9


def test_a_wrong_option_is_named(node: NodeMaker) -> None:
    with pytest.raises(ValueError, match=r"unrecognized arguments: --model.rnk 3"):
        node("--model.rnk", "3")


def test_a_wrong_value_is_named(node: NodeMaker) -> None:
    with pytest.raises(ValueError, match=r'Parser key "model.rank"'):
        node(model={"rank": "many"})


def test_data_that_are_not_there_are_named(node: NodeMaker) -> None:
    with pytest.raises(ValueError, match=r"gone.jsonl is missing; give the path of an existing"):
        node("--data.path", "gone.jsonl")


def test_data_of_others_alone_are_refused(node: NodeMaker) -> None:
    with pytest.raises(ValueError, match=r"no row of rows.jsonl is of client 'eve', they are of"):
        node(name="eve")


def test_settings_that_contradict_each_other_are_named(node: NodeMaker) -> None:
    with pytest.raises(ValueError, match="gradient_clip_algorithm"):
        node("--trainer.gradient_clip_algorithm", "strange")


def test_a_machine_with_several_devices_trains_on_one_unless_told(node: NodeMaker) -> None:
    assert node()._trainer_settings["devices"] == 1
    with pytest.raises(ValueError, match=r"trainer.devices is 2, and a node's ranks are started"):
        node("--trainer.devices", "2")
