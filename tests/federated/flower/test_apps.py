"""Both ends in Flower, without Flower's processes around them."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedsafe[flower]'")

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.supercore.task_identity import TaskIdentity

from fedsafe.federated.flower import client_app, server_app
from fedsafe.federated.flower.outcome import Outcome
from fedsafe.federated.flower.post import FlowerPost
from fedsafe.federated.flower.records import from_records, to_records
from fedsafe.federated.remote.letter import Letter

SECRET = "the text of a sample"


@pytest.fixture(autouse=True)
def in_flower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.chdir(tmp_path)


def context(**entries: Any) -> Context:
    return Context(1, 1, dict(entries), RecordDict(), dict(entries))


def message(content: RecordDict) -> Message:
    metadata = Metadata(1, "m", 1, 7, "", "", 0.0, 42.0, "train")
    return make_message(metadata=metadata, content=content)


def answered(letter: RecordDict, **entries: Any) -> Letter:
    reply = client_app.app(message(letter), context(**{"node-file": "node.json"} | entries))
    assert reply.has_content()
    return from_records(reply.content)


def test_a_node_hands_the_letter_to_its_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def ask(node_file: Path, letter: Letter, *, timeout_seconds: float) -> Letter:
        asked.append((node_file, letter, timeout_seconds))
        return Letter({"kind": "visit"}, b"trained")

    monkeypatch.setattr(client_app, "ask", ask)
    order = Letter({"kind": "visit"}, b"adapter")
    assert answered(to_records(order)) == Letter({"kind": "visit"}, b"trained")
    assert asked == [(Path("node.json"), order, 42.0)]


@pytest.mark.parametrize("error", [ValueError(SECRET), RuntimeError(SECRET), KeyError(SECRET)])
def test_of_an_error_only_its_kind_leaves_a_node(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(*_: Any, **__: Any) -> Letter:
        raise error

    monkeypatch.setattr(client_app, "ask", ask)
    letter = answered(to_records(Letter({"kind": "visit"})))
    assert letter == Letter({"kind": "failure", "error": type(error).__name__})
    assert SECRET in caplog.text  # in the node's own log


def test_a_message_that_is_no_letter_is_answered_with_a_failure() -> None:
    assert answered(RecordDict()).facts == {"kind": "failure", "error": "ValueError"}


def run_server(serve: Callable[..., None], state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsafe.commands.federated_server.serve", serve)
    folder = Path("elsewhere")
    folder.mkdir()
    settings = {"arguments": json.dumps(["--rounds", "2"]), "cwd": str(folder), "state": state}
    server_app.app(grid=None, context=context(**settings))  # type: ignore[arg-type]


def test_the_server_runs_where_it_was_told_with_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    run_server(
        lambda arguments, post: seen.append((arguments, type(post), Path.cwd())),
        str(tmp_path),
        monkeypatch,
    )
    assert seen == [(["--rounds", "2"], FlowerPost, tmp_path / "elsewhere")]
    assert Outcome.read(tmp_path) == Outcome(0, "")
    assert (tmp_path / "process").read_text() == str(os.getpid())


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("fleet.min_clients is 0"), Outcome(1, "fleet.min_clients is 0")),
        (OSError(28, "No space left"), Outcome(1, "[Errno 28] No space left")),
        (KeyboardInterrupt(), Outcome(130, "")),
        (SystemExit(2), Outcome(2, "")),
        (SystemExit("wrong"), Outcome(1, "")),
        (SystemExit(None), Outcome(0, "")),
    ],
    ids=["value", "system", "interrupt", "usage", "text", "exit"],
)
def test_how_the_server_ended_is_told(
    error: BaseException, outcome: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def serve(*_: Any) -> None:
        raise error

    if outcome.status:
        with pytest.raises(SystemExit) as caught:
            run_server(serve, str(tmp_path), monkeypatch)
        assert caught.value.code == outcome.status
    else:
        run_server(serve, str(tmp_path), monkeypatch)
    assert Outcome.read(tmp_path) == outcome


def test_a_fault_is_shown_with_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def serve(*_: Any) -> None:
        raise KeyError("a fault")

    with pytest.raises(SystemExit):
        run_server(serve, str(tmp_path), monkeypatch)
    assert "KeyError: 'a fault'" in capfd.readouterr().err
    assert Outcome.read(tmp_path) == Outcome(
        1, "it failed with KeyError; the lines above say where"
    )


def test_without_anybody_who_waits_the_error_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def serve(*_: Any) -> None:
        raise ValueError("no client came")

    with pytest.raises(SystemExit):
        run_server(serve, "", monkeypatch)
    assert capfd.readouterr().err == "fedsafe federate server: no client came\n"


def test_what_the_server_shows_goes_where_its_user_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def serve(*_: Any) -> None:
        sys.stdout.write("round 1/2\n")
        sys.stderr.write("a warning\n")
        sys.stdout.flush()

    before = os.dup(0)
    with (tmp_path / "shown").open("w") as shown:
        os.dup2(shown.fileno(), 0)
        monkeypatch.setenv(server_app.SHOW_ON_STDIN, "1")
        with capfd.disabled():
            run_server(serve, str(tmp_path), monkeypatch)
        os.dup2(before, 0)
    os.close(before)
    assert (tmp_path / "shown").read_text() == "round 1/2\na warning\n"
