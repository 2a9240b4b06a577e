"""Every option of every command is explained in words."""

import argparse
import importlib
import inspect
import re

import pytest
from jsonargparse import auto_parser
from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.pytorch.cli import LightningArgumentParser

from fedsafe.cli import COMMANDS
from fedsafe.commands import class_names
from fedsafe.commands.training import DESCRIPTIONS, make_cli
from fedsafe.federated.client_drift import FedProx, Scaffold
from fedsafe.federated.partition import IID, Dirichlet, Natural, Quantity
from fedsafe.federated.server_optimizer import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from fedsafe.safety.filter import SafetyFilter
from fedsafe.safety.revision import Reviser
from fedsafe.safety.verdict_targets import VerdictTargets

FUNCTIONS = (
    "filter",
    "revise",
    "measure",
    "table",
    "compare",
    "report",
    "world",
    "generate",
    "export",
)


def training_parser(name: str, monkeypatch: pytest.MonkeyPatch) -> LightningArgumentParser:
    """The parser of one of the Trainer's commands, caught before it parses."""

    class CaughtError(Exception):
        pass

    def catch(cli, parser, args) -> None:
        raise CaughtError(cli._subcommand_parsers[name])

    monkeypatch.setattr("fedsafe.commands.training.FedsafeCLI.parse_arguments", catch)
    with pytest.raises(CaughtError) as caught:
        make_cli([name])
    return caught.value.args[0]


def unexplained(parser: argparse.ArgumentParser) -> list[str]:
    """Options whose help has no words of its own beside their type and default."""
    found = []
    for action in parser._actions:
        explanation = action.help
        words = re.findall(r"[a-zA-Z]{2,}", re.sub(r"%\(\w+\)s", "", explanation or ""))
        if explanation != argparse.SUPPRESS and len(words) < 3:
            found.append(f"{'/'.join(action.option_strings) or action.dest}: {explanation}")
    return found


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_every_option_of_a_training_command_is_explained(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = training_parser(name, monkeypatch)
    assert len(parser._actions) > 70
    assert unexplained(parser) == []
    assert parser.description == DESCRIPTIONS[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_option_of_a_command_is_explained(name: str) -> None:
    module = importlib.import_module(f"fedsafe.commands.{name}")
    described = module.TableSettings if name == "table" else getattr(module, name)
    parser = auto_parser(described, as_positional=False)
    assert unexplained(parser) == []


@pytest.mark.parametrize("side", ["server", "client"])
def test_every_option_of_a_federation_is_explained(side: str) -> None:
    pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")
    parser = importlib.import_module(f"fedsafe.commands.federate_{side}").parser()
    assert len(parser._actions) > 4
    assert unexplained(parser) == []


def test_no_command_is_forgotten() -> None:
    assert set(COMMANDS) == {*DESCRIPTIONS, *FUNCTIONS, "federate"}


def test_an_option_without_words_is_found() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rank")
    parser.add_argument("--alpha", help="%(default)s")
    parser.add_argument("--clients", help="Number of clients in a round.")
    assert [each.partition(":")[0] for each in unexplained(parser)] == ["--rank", "--alpha"]


@pytest.mark.parametrize(
    "part",
    [
        *(IID, Dirichlet, Quantity, Natural),
        *(FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi),
        *(FedProx, Scaffold),
        *class_names.NAMED,
        VerdictTargets,
        SafetyFilter,
        Reviser,
    ],
)
def test_every_setting_of_a_part_is_explained(part: type) -> None:
    assert inspect.getdoc(part)
    for parameter in get_signature_parameters(part, "__init__"):
        assert parameter.doc, f"{part.__name__}({parameter.name}) has no explanation"


def test_checkpoints_are_explained_in_words_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(training_parser("fit", monkeypatch).format_help().split())
    assert "Checkpoint to go on from, or to measure: a file, or `last`" in text
    assert "registry" not in text.partition("--ckpt_path CKPT_PATH Checkpoint")[2]
