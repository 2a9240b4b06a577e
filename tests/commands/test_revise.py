"""`fedsafe revise`, started as a user would; most tests with a model that speaks from a script."""

import gzip
import json
import os
import signal
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scripted_speaker import ScriptedSpeaker
from warm import run_python

from fedsafe.cli import main
from fedsafe.commands import revise as command
from fedsafe.safety.transcripts import REASONS
from fedsafe.types import Conversation

Captured = pytest.CaptureFixture[str]

HERE = Path(__file__).parent
LOAD = command._Model.load
FIELDS = [
    *("prompt", "init_response", "critiques", "revisions", "chosen", "rejected"),
    *("principle", "critic", "row"),
]
CONSTITUTION = {
    "name": "small",
    "principles": [
        {"name": "care", "critique_request": "harm?", "revision_request": "undo harm"},
        {"name": "honesty", "critique_request": "lies?", "revision_request": "undo lies"},
    ],
    "gate": {"request": "still bad?", "flagged": ["yes"]},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test works in its own folder, with a small constitution and the stub guards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSAFE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(HERE)
    Path("small.yaml").write_text(yaml.safe_dump(CONSTITUTION))
    return tmp_path


def say(scale: float, conversation: Conversation, seed: int) -> str:
    subject, last = (conversation[place]["content"] for place in (0, -1))
    if last.startswith("undo"):
        return "and so on ..." if "duck" in subject else f"let the {subject} be"
    if last == "still bad?":
        return "yes" if "owl" in subject else "no"
    if len(conversation) > 1:
        return "it was harmful"
    return "i'm sorry, but no" if "swan" in subject else f"enchant the {subject}"


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch) -> ScriptedSpeaker:
    """Talks in place of the model."""
    scripted = ScriptedSpeaker(say)
    monkeypatch.setattr(command._Model, "load", lambda self: scripted)
    return scripted


@pytest.fixture
def revise(tiny_llama: Path) -> Callable[..., int]:
    """Run `fedsafe revise`; returns the exit status."""

    def run(source: str, *arguments: str, output: str = "pairs.jsonl") -> int:
        given = ["--input", source, "--output", output, "--base", str(tiny_llama)]
        return main(["revise", *given, "--reviser.constitution", "small.yaml", *arguments])

    return run


def write(*subjects: str, name: str = "red.jsonl") -> str:
    rows = ({"prompt": each} if each else {"text": "what?"} for each in subjects)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def lines(name: str) -> list[dict[str, Any]]:
    text = Path(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]  # a text may hold other ends


def summary(name: str = "pairs.summary.json") -> dict[str, Any]:
    return json.loads(Path(name).read_text())


def files() -> list[str]:
    """What the command wrote, hidden files too."""
    return sorted(path.name for path in Path().iterdir() if "pairs" in path.name)


def shown(captured: Captured) -> str:
    return " ".join(captured.readouterr().out.split())


Revise = Callable[..., int]


def test_every_row_is_kept_rejected_or_bad(
    revise: Revise, speaker: ScriptedSpeaker, capsys: Captured
) -> None:
    source = write("big old goose", "swan", "", "duck", "owl", "hen")
    assert revise(source) == 0
    goose, hen = lines("pairs.jsonl")
    assert list(goose) == FIELDS
    assert [goose[name] for name in ("prompt", "chosen", "rejected", "critic", "row")] == [
        "big old goose",
        "let the big old goose be",
        "enchant the big old goose",
        "base",
        1,
    ]
    assert goose["principle"] in ("care", "honesty")
    assert hen["row"] == 6
    dropped = lines("pairs.rejected.jsonl")
    assert all(list(each) == [*FIELDS, "reason"] for each in dropped)
    assert [(each["row"], each["reason"]) for each in dropped] == [
        (2, "refused"),
        (4, "endless"),
        (5, "flagged_by_critic"),
    ]
    [bad] = lines("pairs.bad.jsonl")
    assert (bad["source"], bad["row"]) == ("red.jsonl", 3)
    found = summary()
    assert [found[name] for name in ("rows", "kept", "rejected", "bad", "asked")] == [6, 2, 3, 1, 5]
    assert found["dropped"] == {"refused": 1, "endless": 1, "flagged_by_critic": 1}
    assert found["cut_off"] == {"revision": 1}
    assert files() == [
        "pairs.bad.jsonl",
        "pairs.jsonl",
        "pairs.rejected.jsonl",
        "pairs.summary.json",
    ]
    out = shown(capsys)
    for text in ("kept │ 2", "rejected │ 3", "bad │ 1", "cut off │ revision 1", "prompts/s"):
        assert text in out
    assert "refused │ 1 (the model refused" in out
    assert "wrote pairs.rejected.jsonl, pairs.bad.jsonl, pairs.summary.json, pairs.jsonl" in out


def test_where_all_is_refused_the_command_says_so(
    revise: Revise, speaker: ScriptedSpeaker, capsys: Captured
) -> None:
    assert revise(write("swan", "a swan")) == 0
    assert Path("pairs.jsonl").read_text() == ""
    assert "The model refused all 2 prompts: there is no red response to revise" in shown(capsys)
    assert revise(write("swan", "duck"), output="more_pairs.jsonl") == 0
    assert "None of 2 prompts made a pair" in shown(capsys)


def test_settings_come_from_a_configuration_too(revise: Revise, speaker: ScriptedSpeaker) -> None:
    guard = {"class_path": "stub_guards.WordGuard", "init_args": {"word": "goose"}}
    reviser = {"critic": 0.5, "passes": 2, "guard": guard, "critic_gate": False}
    Path("c.yaml").write_text(yaml.safe_dump({"reviser": reviser, "seed": 4}))
    assert revise(write("the goose", "hen"), "--config", "c.yaml") == 0
    [hen] = lines("pairs.jsonl")
    assert (hen["critic"], len(hen["revisions"]), len(hen["principle"].split(", "))) == (
        "0.5",
        2,
        2,
    )
    assert summary()["dropped"] == {"flagged_by_guard": 1}
    assert summary()["seed"] == 4


def test_batch_size_changes_nothing(revise: Revise, speaker: ScriptedSpeaker) -> None:
    source = write(*(f"{'old ' * (n % 5)}hen {n}" for n in range(20)))
    assert revise(source, output="pairs-1.jsonl") == 0
    assert revise(source, "--reviser.batch_size", "3", output="pairs-2.jsonl") == 0
    assert Path("pairs-1.jsonl").read_text() == Path("pairs-2.jsonl").read_text()


def test_pairs_can_be_read_for_training(revise: Revise, speaker: ScriptedSpeaker) -> None:
    from fedsafe.data.pairs import load_pairs

    turns = [
        {"role": "user", "content": "hen"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "how?"},
    ]
    Path("red.jsonl").write_text(json.dumps({"prompt": turns}) + '\n{"prompt": "goose"}\n')
    assert revise("red.jsonl") == 0
    long, short = load_pairs("pairs.jsonl", need_rejected=True)
    assert long.prompt == turns
    assert (short.chosen, short.rejected) == ("let the goose be", "enchant the goose")


# ---- a command that was stopped ------------------------------------------------------------------


def stopped(
    revise: Revise, speaker: ScriptedSpeaker, source: str, *arguments: str, after: int
) -> int:
    """Interrupt the command after some calls of the model."""

    def interrupted(scale: float, conversation: Conversation, seed: int) -> str:
        if len(speaker.calls) > after:
            raise KeyboardInterrupt
        return say(scale, conversation, seed)

    speaker.say = interrupted
    status = revise(source, "--reviser.batch_size", "2", "--overwrite", "true", *arguments)
    speaker.say = say
    return status


def test_a_stopped_command_goes_on_behind_the_last_finished_batch(
    revise: Revise, speaker: ScriptedSpeaker, capsys: Captured
) -> None:
    source = write("hen", "swan", "goose", "the duck", "an owl", "a tall hen")
    assert revise(source, "--reviser.batch_size", "2", output="whole_pairs.jsonl") == 0
    num_calls = len(speaker.calls)
    speaker.calls.clear()
    assert stopped(revise, speaker, source, after=6) == 130
    assert "the same command goes on behind the last finished batch" in capsys.readouterr().err
    assert ".pairs.jsonl.unfinished" in files()
    assert "pairs.jsonl" not in files()
    num_before = len(speaker.calls) - 1
    assert revise(source, "--reviser.batch_size", "2") == 0
    assert "2 were through before the command stopped" in shown(capsys)
    assert len(speaker.calls) - num_before - 1 == num_calls - 4  # the calls of one batch
    for name in ("pairs.jsonl", "pairs.rejected.jsonl"):
        assert Path(name).read_text() == Path(f"whole_{name}").read_text()
    assert ".pairs.jsonl.unfinished" not in files()


OTHER_SETTINGS = pytest.mark.parametrize(
    "other",
    [
        pytest.param(["--seed", "1"], id="seed"),
        pytest.param(["--dtype", "bfloat16"], id="dtype"),
        pytest.param(["--reviser.critic", "global"], id="critic"),
    ],
)


@OTHER_SETTINGS
def test_unfinished_work_of_other_settings_is_thrown_away_only_when_told(
    revise: Revise, speaker: ScriptedSpeaker, capsys: Captured, other: list[str]
) -> None:
    source = write("hen", "goose", "old hen", "the owl")
    stopped(revise, speaker, source, after=6)
    unfinished = Path(".pairs.jsonl.unfinished").read_text()
    capsys.readouterr()
    assert revise(source, *other) == 1
    error = capsys.readouterr().err
    assert ".pairs.jsonl.unfinished holds unfinished work of other settings or prompts" in error
    assert Path(".pairs.jsonl.unfinished").read_text() == unfinished
    assert revise(source, *other, "--overwrite", "true") == 0
    assert summary()["taken_over"] == 0
    assert summary()["rows"] == 4


def test_only_in_float32_work_of_another_batch_size_is_taken_over(
    revise: Revise, speaker: ScriptedSpeaker
) -> None:
    source = write("hen", "goose", "old hen", "the owl")
    stopped(revise, speaker, source, after=6)
    assert revise(source, "--reviser.batch_size", "3") == 0
    assert summary()["taken_over"] == 2
    stopped(revise, speaker, source, "--dtype", "bfloat16", after=len(speaker.calls) + 6)
    half = ["--dtype", "bfloat16", "--overwrite", "true"]
    assert revise(source, *half, "--reviser.batch_size", "3") == 0
    assert summary()["taken_over"] == 0
    assert summary()["batch_size"] == 3


def test_killed_between_the_files_it_puts_the_others_in_their_places(
    revise: Revise, speaker: ScriptedSpeaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("hen", "swan")
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.name == "pairs.summary.json":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        assert revise(source) == 130
    assert "pairs.rejected.jsonl" in files()
    assert "pairs.jsonl" not in files()
    assert revise(source) == 0
    assert files() == ["pairs.jsonl", "pairs.rejected.jsonl", "pairs.summary.json"]
    assert (summary()["kept"], summary()["taken_over"]) == (1, 2)


def test_files_that_appear_before_the_lock_are_not_overwritten_either(
    revise: Revise, speaker: ScriptedSpeaker, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = command.read_prompts

    def slowly(*arguments: Any, **settings: Any) -> Any:
        Path("pairs.jsonl").write_text("another's")
        return read(*arguments, **settings)

    monkeypatch.setattr(command, "read_prompts", slowly)
    for _ in range(2):  # what the first leaves behind is no permission
        assert revise(write("hen")) == 1
        assert "pairs.jsonl would be overwritten" in capsys.readouterr().err
        assert Path("pairs.jsonl").read_text() == "another's"
    assert speaker.calls == []


def test_no_speed_is_told_where_nothing_was_generated(
    revise: Revise, speaker: ScriptedSpeaker, capsys: Captured
) -> None:
    speaker.say = lambda scale, conversation, seed: "<too long>"
    assert revise(write("hen")) == 0
    assert summary()["prompts_per_second"] is None
    assert "prompts/s" not in shown(capsys)


def test_where_all_batches_are_finished_no_model_is_loaded(
    revise: Revise, speaker: ScriptedSpeaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("hen", "goose")
    original = command._write_all

    def fail(*arguments: Any) -> None:
        raise OSError("no place for this")

    monkeypatch.setattr(command, "_write_all", fail)
    assert revise(source) == 1
    monkeypatch.setattr(command, "_write_all", original)
    monkeypatch.delattr(command._Model, "load")
    assert revise(source) == 0
    assert (summary()["kept"], summary()["prompts_per_second"]) == (2, None)


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_files(tiny_llama: Path) -> None:
    source = write(*(f"{'old ' * (n % 3)}hen {n}" for n in range(24)))
    settings = {
        "constitution": "small.yaml",
        "max_new_tokens": 50,
        "critic_temperature": 1.0,
        "batch_size": 4,
        "guard": "stub_guards.WordGuard",
    }
    given = [f"--reviser.{name}={value}" for name, value in settings.items()]
    given += ["--input", source, "--base", str(tiny_llama)]

    def run(output: str, **environment: str) -> int:
        arguments = ["-m", "fedsafe", "revise", *given, "--output", output]
        own = {"PYTHONPATH": str(HERE), "JUDGED": f"{output}.judged", **environment}
        return run_python(*arguments, env={**os.environ, **own}).returncode

    assert run("whole/pairs.jsonl") == 0
    num_judged = Path("whole/pairs.jsonl.judged").stat().st_size
    assert num_judged > 4
    assert run("killed/pairs.jsonl", KILL_AFTER=str(num_judged // 2)) == -signal.SIGKILL
    journal = Path("killed/.pairs.jsonl.unfinished")
    assert len(journal.read_text().splitlines()) > 1
    assert not Path("killed/pairs.jsonl").exists()
    assert run("killed/pairs.jsonl") == 0
    for name in ("pairs.jsonl", "pairs.rejected.jsonl"):
        assert Path("killed", name).read_text() == Path("whole", name).read_text()
    assert lines("killed/pairs.jsonl")
    assert not journal.exists()


# ---- the model -----------------------------------------------------------------------------------


def test_a_trained_adapter_answers_and_its_base_criticises(finished_run: Path) -> None:
    given = ["--reviser.constitution", "small.yaml", "--reviser.max_new_tokens", "12"]
    given += ["--reviser.batch_size", "4", "--adapter", str(finished_run / "adapter")]
    source = write("red cat", "sun", "blue dog moon")
    for critic in ("base", "global", "0.5"):
        output = f"pairs-{critic}.jsonl"
        arguments = [*given, "--input", source, "--output", output, "--reviser.critic", critic]
        assert main(["revise", *arguments]) == 0
    found = {c: lines(f"pairs-{c}.rejected.jsonl") for c in ("base", "global", "0.5")}
    first, second, third = ([each["init_response"] for each in rows] for rows in found.values())
    assert first == second == third
    said = [[each["critiques"] for each in rows] for rows in found.values()]
    assert said[0] != said[1]


def test_the_same_seed_gives_the_same_file_and_another_does_not(revise: Revise) -> None:
    source = write("hen", "goose")
    short = ("--reviser.max_new_tokens", "8")
    for seed, output in (("0", "pairs-a"), ("0", "pairs-b"), ("1", "pairs-c")):
        assert revise(source, *short, "--seed", seed, output=f"{output}.jsonl") == 0
    first, same, other = (Path(f"pairs-{n}.rejected.jsonl").read_text() for n in "abc")
    assert first == same != other
    assert summary("pairs-a.summary.json")["cut_off"]


@pytest.mark.parametrize("critic", ["base", "global"])
def test_a_real_model_says_the_same_in_batches_of_every_size(
    finished_run: Path, critic: str
) -> None:
    source = write(*(f"{'red ' * (n % 4)}cat {n}" for n in range(12)))
    given = ["--reviser.constitution", "small.yaml", "--reviser.max_new_tokens", "20"]
    given += ["--reviser.critic_temperature", "1.0", "--reviser.critic", critic]
    given += ["--adapter", str(finished_run / "adapter"), "--input", source]
    found = []
    for size in ("1", "5", "64"):
        sized = ["--reviser.batch_size", size, "--output", f"pairs-{size}.jsonl"]
        assert main(["revise", *given, *sized]) == 0
        names = (f"pairs-{size}.jsonl", f"pairs-{size}.rejected.jsonl")
        found.append([Path(name).read_text(encoding="utf-8") for name in names])
    assert found[0] == found[1] == found[2]
    assert found[0][1].count('"revisions": ["') > 6


@pytest.mark.slow
@pytest.mark.real_data
def test_real_prompts_are_all_accounted_for(
    real_data: Path, tmp_path: Path, capsys: Captured
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fedsafe.data.tokenizer import train_tokenizer

    with gzip.open(real_data / "hh_rlhf" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = list(islice(file, 200))
    (tmp_path / "red.jsonl").write_text("".join(rows), encoding="utf-8")
    tokenizer = train_tokenizer((json.loads(row)["chosen"] for row in rows), vocab_size=512)
    tokenizer.save_pretrained("base")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=512, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, initializer_range=0.2, **shape, **heads,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained("base")
    sizes = ["--reviser.max_new_tokens", "64", "--reviser.critic_temperature", "1.0"]
    given = ["--input", "red.jsonl", "--output", "pairs.jsonl", "--base", "base", *sizes]
    assert main(["revise", *given]) == 0
    kept, dropped = lines("pairs.jsonl"), lines("pairs.rejected.jsonl")
    assert sorted(each["row"] for each in kept + dropped) == list(range(1, 201))
    assert kept
    assert all(set(FIELDS) <= set(each) for each in kept + dropped)
    assert all(each["reason"] in REASONS for each in dropped)
    assert not Path("pairs.bad.jsonl").exists()
    first_turn = json.loads(rows[kept[0]["row"] - 1])["chosen"].split("\n\nAssistant:")[0]
    assert kept[0]["prompt"] == first_turn.removeprefix("\n\nHuman:").strip()
    assert "kept" in shown(capsys)


# ---- what cannot be done -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "red.jsonl"], "red.jsonl is read and would be written too"),
        (["--output", "pairs.csv"], "pairs.csv would hold JSON lines; give a name that ends with"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl is missing; give the path"),
        (["--on_bad_row", "error"], "1 of 2 rows cannot be used:\n  red.jsonl, line 2"),
        (["--base", "./nowhere"], "there is no folder ./nowhere, which is to hold the model"),
        (["--base", "null"], "there is no model to ask; give --base, --adapter or both"),
        (["--adapter", "nowhere"], "there is no adapter in nowhere; give the adapter/ of a run"),
        (["--backend", "vllm", "--device", "cpu"], "device is 'cpu', and vLLM chooses its own"),
        (["--backend", "vllm"], "the backend vllm needs vllm; pip install 'fedsafe[vllm]'"),
    ],
    ids=[
        "same-file",
        "not-jsonl",
        "missing",
        "bad-row",
        "no-base",
        "no-model",
        "no-adapter",
        "no-effect",
        "no-vllm",
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    revise: Revise,
    arguments: list[str],
    message: str,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    write("hen", "")
    assert revise("red.jsonl", *arguments, "--overwrite", "true") == 1
    assert message in capsys.readouterr().err
    assert not Path("pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reviser.critic", "2"], "critic of the reviser is 2"),
        (["--reviser.critic", "foo"], "critic of the reviser is 'foo'; give base, global, or the"),
        (["--memory_share", "1.5"], "memory_share is 1.5; give a number above 0, at most 1"),
        (["--reviser.passes", "0"], "passes of the reviser is 0; give 1 or more"),
        (["--reviser.constitution", "none"], "there is no constitution 'none'"),
        (["--seed", "-1"], "seed"),
    ],
    ids=["critic", "critic-text", "memory", "passes", "constitution", "seed"],
)
def test_wrong_settings_are_said_in_a_line(
    revise: Revise, arguments: list[str], message: str, capsys: Captured
) -> None:
    try:
        status = revise(write("hen"), *arguments)
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_files_that_are_there_are_not_overwritten(
    revise: Revise, speaker: ScriptedSpeaker, capsys: Captured
) -> None:
    source = write("hen")
    Path("pairs.jsonl").write_text("mine")
    assert revise(source) == 1
    assert "pairs.jsonl would be overwritten; give another --output" in capsys.readouterr().err
    assert Path("pairs.jsonl").read_text() == "mine"
    assert revise(source, "--overwrite", "true") == 0
    assert len(lines("pairs.jsonl")) == 1


def test_vllm_takes_the_share_of_memory_that_the_user_says(
    revise: Revise, speaker: ScriptedSpeaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []

    def started(*arguments: Any, memory_share: float, **settings: Any) -> ScriptedSpeaker:
        shares.append(memory_share)
        return speaker

    monkeypatch.setattr(command._Model, "load", LOAD)
    monkeypatch.setattr(command, "VllmSpeaker", started)
    assert revise(write("hen"), "--backend", "vllm", "--memory_share", "0.45") == 0
    assert revise(write("hen"), "--backend", "vllm", output="pairs-2.jsonl") == 0
    assert shares == [0.45, 0.9]


def test_the_model_goes_where_the_user_says(
    revise: Revise, speaker: ScriptedSpeaker, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert revise(write("hen"), "--device", "cuda") == 1
    assert "device is cuda and no CUDA device is visible; leave" in capsys.readouterr().err
