"""Every file of configs/ is parsed as its opening comment says, and every algorithm trains."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import auto_cli, auto_parser
from memory_post import MemoryPost
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fedsafe.cli import main
from fedsafe.commands import training
from fedsafe.commands.federated_server import serve
from fedsafe.commands.filter import filter
from fedsafe.commands.measure import measure
from fedsafe.commands.revise import revise
from fedsafe.table_settings import TableSettings, check, read_layers
from fedsafe.world.grammar import load_grammar

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
FUNCTIONS = {"filter": filter, "measure": measure, "revise": revise}
ALGORITHMS = sorted((REPOSITORY / "configs" / "algorithm").glob("*.yaml"))


def arguments_of(file: Path) -> list[str]:
    """The `fedsafe` command in a file's first lines, without the program."""
    commands = r"fedsafe (?:fit|test|table|filter|measure|revise|federate server) [^\n]*"
    return shlex.split(re.findall(commands, file.read_text())[0])[1:]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands name files relative to it."""
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: str(f.relative_to(REPOSITORY / "configs")))
def test_the_command_of_a_configuration_is_parsed(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = arguments_of(file)
    assert str(file.relative_to(REPOSITORY)) in arguments
    if name == "table":
        check_table(auto_cli(TableSettings, args=arguments, as_positional=False))
        return
    if name in FUNCTIONS:
        auto_parser(FUNCTIONS[name], as_positional=False).parse_args(arguments)
        return
    with pytest.raises(SystemExit) as caught:
        print_config(name, arguments)
    assert caught.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    for part, values in yaml.safe_load(file.read_text()).items():
        if isinstance(values, dict):
            assert values.keys() <= parsed[part].keys()


def print_config(name: str, arguments: list[str]) -> None:
    if name == "federate":
        serve([*arguments[1:], "--print_config"], MemoryPost({}))
    main([name, *arguments, "--print_config"])


def check_table(table: TableSettings) -> None:
    """Every file that it names is there, and every change has something to change."""
    check(table)
    read_layers([*table.configs, *table.evaluation], table)
    read_layers([config for row in table.rows for config in row.configs], table)
    read_layers([file for each in table.guards for file in (*each.configs, each.filter)], table)


def test_no_algorithm_is_forgotten() -> None:
    names = "central fedadagrad fedadam fedavg fedavgm fedprox fedyogi local scaffold"
    assert [file.stem for file in ALGORITHMS] == names.split()


@pytest.mark.parametrize("file", ALGORITHMS, ids=lambda file: file.stem)
def test_every_algorithm_trains(file: Path, config: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(config), "--config", str(file), "--run_dir", str(tmp_path / "run")]
    assert main(["fit", *arguments]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").open()]
    assert [row["round"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["val/loss"]) for row in rows)
    assert rows[1]["val/loss"] < rows[0]["val/loss"] + 1
    if file.stem == "local":
        assert len(list((tmp_path / "run" / "adapters").iterdir())) >= 2
    else:
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "rounds.png").is_file()


def logits(model: PreTrainedModel | PeftModel, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.slow
@pytest.mark.real_data
def test_own_conversations_are_learned_and_the_adapter_loads_elsewhere(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, make_cli = [], training.make_cli
    monkeypatch.setattr(training, "make_cli", lambda a: trained.append(make_cli(a)))
    run_dir = tmp_path / "run"
    smaller = ["--rounds", "3", "--federated.local_steps", "4", "--data.max_length", "128"]
    smaller += ["--model.from_config.num_hidden_layers", "2", "--trainer.accelerator", "cpu"]
    own = ["--data.path", str(real_data / "benign" / "alpaca_en_demo.json")]
    arguments = ["--config", "configs/jsonl.yaml", *own, *smaller, "--run_dir", str(run_dir)]
    assert main(["fit", *arguments]) == 0

    rows = [json.loads(line) for line in (run_dir / "rounds.jsonl").open()]
    losses = [row["val/loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "adapter")
    ids = tokenizer("User: Name three fruits.", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(run_dir / "base")
    untrained = logits(base, ids)
    loaded = logits(PeftModel.from_pretrained(base, run_dir / "adapter"), ids)
    ours = trained[0].model.peft_model
    ours.set_attn_implementation("sdpa")
    torch.testing.assert_close(loaded, logits(ours, ids), atol=1e-5, rtol=1e-5)
    assert (loaded - untrained).abs().max() > 0.1


def test_the_demo_recognises_refusals_as_its_table_does() -> None:
    demo = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
    [probe] = demo["trainer"]["callbacks"]
    [asked] = probe["init_args"]["benchmarks"]
    assert tuple(asked["init_args"]["openings"]) == load_grammar().refusal_openings
