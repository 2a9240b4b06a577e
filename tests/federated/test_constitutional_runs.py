"""Runs whose server revises its answers and trains on them."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint
from round_rows import without_seconds
from torch.optim import AdamW
from warm import run_python

from fedsafe.data.augmentation import CaiAugmentation
from fedsafe.data.pairs import load_pairs
from fedsafe.data.preferences import PreferenceStore
from fedsafe.federated.client_drift import Scaffold
from fedsafe.federated.constitutional_training import ConstitutionalTraining, Mixture
from fedsafe.federated.round_log import RoundLog
from fedsafe.federated.server_listener import ServerVisitListener
from fedsafe.federated.server_visit import ServerVisit
from fedsafe.safety.revision import Reviser

FederationMaker = Callable[..., Any]
CONSTITUTION = """
name: short
principles:
  - {name: one, critique_request: is it bad, revision_request: say it again}
  - {name: two, critique_request: what is bad, revision_request: do better}
"""
WORDS = ("red", "blue", "green", "cat", "dog", "sun", "moon")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Pairs, helpful pairs and red-team prompts."""
    rows = {
        "pairs": [
            {"prompt": f"{a} {b}", "chosen": f"no {a}", "rejected": f"take the {b} {a}"}
            for a in WORDS
            for b in WORDS[:2]
        ],
        "helpful": [{"prompt": f"say {a}", "chosen": a, "rejected": "no"} for a in WORDS],
        "prompts": [{"prompt": f"how to {a} the {b}"} for a in WORDS for b in WORDS],
    }
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    constitution = tmp_path / "constitution.yaml"
    constitution.write_text(CONSTITUTION)
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows} | {
        "constitution": str(constitution)
    }


def ready(files: dict[str, str], **training: Any) -> dict[str, Any]:
    """Settings of a federation whose server trains on ready pairs."""
    cai = CaiAugmentation(
        pairs=files["pairs"], helpful=files["helpful"], helpful_share=0.25, batch_size=4
    )
    rates = {"sft_learning_rate": 1e-2, "dpo_learning_rate": 1e-3}
    return {
        "data": {"cai": cai},
        "rounds": {"cai": ConstitutionalTraining(**{"iterations": 7, **rates, **training})},
    }


def made(files: dict[str, str], *, data: Any = None, reviser: Any = None, **training: Any) -> Any:
    """Settings of a federation whose server makes its pairs; the model is random, so few are."""
    speaking: dict[str, Any] = {"max_new_tokens": 48, "critic_temperature": 1.0}
    speaking["constitution"] = files["constitution"]
    settings = ready(files, **training)
    settings["data"]["cai"] = CaiAugmentation(
        prompts=files["prompts"],
        reviser=Reviser(**(speaking | (reviser or {}))),
        helpful=files["helpful"],
        batch_size=4,
        **(data or {}),
    )
    return settings


def with_dropout(settings: dict[str, Any]) -> dict[str, Any]:
    model = {"lora_dropout": 0.2, "warmup_steps": 2}
    settings["data"]["validation_share"] = 0.1
    return {**settings, "model": model}


# ---- what the visit does -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["federated", "central"])
@pytest.mark.parametrize("regime", ["cheap", "final", "adaptive"])
def test_no_iterations_are_no_constitutional_training(
    federation: FederationMaker, files: dict[str, str], regime: str, mode: str
) -> None:
    off = federation("off", model={"lora_dropout": 0.2}, rounds={"mode": mode}).fit()
    settings = made(files, iterations=0, regime=regime)
    settings["rounds"]["mode"] = mode
    on = federation("on", model={"lora_dropout": 0.2}, **settings).fit()
    assert torch.equal(on.adapter, off.adapter)
    assert on.rows == off.rows
    assert on.trainer.global_step == off.trainer.global_step
    names = [{f.relative_to(run.folder) for f in run.folder.rglob("*")} for run in (on, off)]
    assert names[0] == names[1]


def test_the_visit_is_sft_and_then_dpo_from_the_average(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    """Against a plain loop with an optimizer of its own, on the average of a run without CAI."""
    one_round = {"trainer": {"max_epochs": 1}}
    off = federation("off", **one_round).fit()
    on = federation("on", **one_round, **ready(files, nll_weight=0.5, beta=0.3)).fit()

    module, tokenizer = off.module, off.data.tokenizer
    pairs = load_pairs(files["pairs"], need_rejected=True)
    helpful = load_pairs(files["helpful"], need_rejected=True)
    store = PreferenceStore([*pairs, *helpful], tokenizer, max_length=512)
    places = np.arange(len(pairs)), np.arange(len(pairs), len(store))
    adapter = module.flat_adapter()
    assert torch.equal(adapter.read(), off.adapter)

    preferred = []

    def train(batches: Any, rate: float) -> list[float]:
        optimizer = AdamW(adapter.parameters, lr=rate, weight_decay=0.0)
        losses = []
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / len(batches))
            optimizer.zero_grad()
            output = module.training_step(batch, 0)
            loss = output["loss"]
            loss.backward()
            preferred.append(int(output.get("num_preferred", 0)))
            optimizer.step()
            losses.append(loss.item())
        return losses

    steps = {
        name: [Mixture(name, *places, 3, 1).samples_of(s, seed=0, round_=0).tolist() for s in r]
        for name, r in (("sft", range(3)), ("dpo", range(4)))
    }
    sft = train([store.supervised(each)[0] for each in steps["sft"]], 1e-2)
    reference = torch.zeros(len(store), 2)
    for some, packed in store.both_answers(range(len(store))):
        reference[some] = module.answer_logprobs(packed).view(-1, 2)
    settings = {"reference": reference, "beta": 0.3, "nll_weight": 0.5}
    dpo = train([store.preference(each, **settings)[0] for each in steps["dpo"]], 1e-3)

    torch.testing.assert_close(on.adapter, adapter.read(), rtol=0, atol=1e-6)
    assert not torch.allclose(on.adapter, off.adapter, atol=1e-3)
    record = on.rows[0]["cai"]
    assert record["sft_loss"] == pytest.approx(np.mean(sft), rel=1e-5)
    assert record["dpo_loss"] == pytest.approx(np.mean(dpo), rel=1e-5)
    assert (record["sft_steps"], record["dpo_steps"]) == (3, 4)
    trained = sum(store.num_tokens(each, both=False) for each in steps["sft"])
    trained += sum(store.num_tokens(each, both=True) for each in steps["dpo"])
    assert record["tokens_trained"] == trained
    used = sorted({index for each in steps["dpo"] for index in each})
    assert record["tokens_read"] == store.num_tokens(used, both=True)
    assert record["preferred"] == sum(preferred) / 16
    change = (on.adapter - off.adapter).norm().item()
    assert record["update_norm"] == pytest.approx(change, rel=1e-4)


def test_clients_start_from_the_trained_adapter_and_it_is_the_one_on_disk(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    first = federation("first", trainer={"max_epochs": 1}, **ready(files)).fit()
    seen = []

    class Starts(Checkpoint):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, *_: Any) -> None:
            if batch.key.round == 1 and batch.key.starts_visit and not batch.key.is_server_visit:
                seen.append(module.flat_adapter().read())

    both = federation("both", callbacks=(Starts(),), **ready(files)).fit()
    assert len(seen) == 2
    assert all(torch.equal(start, first.adapter) for start in seen)
    on_disk = load_file(both.folder / "adapter" / "adapter_model.safetensors")
    for name, tensor in get_peft_model_state_dict(both.module.peft_model).items():
        assert torch.equal(on_disk[name], tensor), name
    assert torch.equal(both.module.flat_adapter().read(), both.adapter)


def test_scaffolds_memory_is_of_the_clients_alone(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    """The server's gradients neither are corrected nor enter the control variates."""
    runs = []
    for name, settings in (("off", {}), ("on", ready(files))):
        drift = Scaffold()
        merged = {**settings, "rounds": {**settings.get("rounds", {}), "client_drift": drift}}
        runs.append(federation(name, trainer={"max_epochs": 1}, **merged).fit())
    states = [run.rounds.client_drift.state_dict() for run in runs]
    assert str(states[0]) == str(states[1])
    assert not torch.equal(runs[0].adapter, runs[1].adapter)


def test_every_round_draws_anew(
    federation: FederationMaker, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples, prompts, and the seeds of revision, probe and dropout."""
    drawn: dict[str, list[Any]] = {"steps": [], "prompts": [], "revision": [], "probe": []}
    samples_of, revise = Mixture.samples_of, CaiAugmentation.revise

    def steps(mixture: Mixture, step: int, **key: int) -> Any:
        found = samples_of(mixture, step, **key)
        if mixture.objective == "sft" and step == 0:
            drawn["steps"].append((key["round_"], found.tolist()))
        return found

    def revising(cai: CaiAugmentation, speaker: Any, places: Any, **settings: Any) -> Any:
        drawn["prompts"].append(tuple(places))
        drawn["revision"].append(settings["seed"])
        return revise(cai, speaker, places, **settings)

    def probing(*_: Any, seed: int, **__: Any) -> tuple[float, int, int]:
        drawn["probe"].append(seed)
        return 0.0, 1, 1

    monkeypatch.setattr(Mixture, "samples_of", steps)
    monkeypatch.setattr(CaiAugmentation, "revise", revising)
    monkeypatch.setattr(Reviser, "refusal_rate", probing)
    adaptive = {"regime": "adaptive", "num_probe": 5, "probe_every": 2}
    federation("run", **made(files, iterations=20, **adaptive)).fit()
    assert [round_ for round_, _ in drawn["steps"]] == [0, 1]
    assert len(set(drawn["prompts"])) == len(set(drawn["revision"])) == 2
    assert len(set(drawn["probe"])) == len(drawn["probe"]) > 4
    assert not set(drawn["revision"]) & set(drawn["probe"])


def test_the_final_regime_trains_after_the_last_round_alone(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    off = federation("off").fit()
    on = federation("on", **ready(files, regime="final", iterations=4)).fit()
    assert [row.get("cai") is not None for row in on.rows] == [False, True]
    assert on.rows[0] == off.rows[0]
    assert on.rows[1]["cai"]["regime"] == "final"
    assert on.rows[1]["clients"] == off.rows[1]["clients"]


def test_accumulated_parts_of_a_step_change_nothing(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    settings = {
        "model": {"optimizer": "sgd", "learning_rate": 0.1}
    }  # AdamW enlarges tiny gradients
    settings |= ready(files, sft_learning_rate=0.1, dpo_learning_rate=0.1)
    whole = federation("whole", **settings).fit()
    parts = federation("parts", trainer={"accumulate_grad_batches": 2}, **settings).fit()
    torch.testing.assert_close(parts.adapter, whole.adapter, rtol=0, atol=1e-6)
    start = whole.start
    assert not torch.allclose(whole.adapter, start, atol=1e-2)


def test_central_training_can_be_constitutional_too(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    settings = ready(files)
    settings["rounds"]["mode"] = "central"
    assert federation("central", **settings).fit().rows[1]["cai"]["sft_steps"] == 3


# ---- pairs of the model itself -------------------------------------------------------------------


def test_each_round_makes_pairs_of_its_own_model(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    run = federation("run", **made(files, iterations=20)).fit()
    written = [load_pairs(str(run.folder / "pairs" / f"round-000{n}.jsonl"), need_rejected=True)
               for n in (1, 2)]  # fmt: skip
    for pairs, row in zip(written, run.rows, strict=True):
        record = row["cai"]
        assert record["asked"] == 20  # 10 steps of 2
        assert record["kept"] == len(pairs) == record["pairs"] == record["samples"] > 0
        assert record["kept"] + sum(record["dropped"].values()) == 20
        assert record["tokens_generated"] > 20
        assert record["tokens_read"] > 0
    assert written[0] != written[1]


def test_pairs_can_be_made_once_before_training(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    run = federation("run", **made(files, data={"renew": False})).fit()
    assert [file.name for file in (run.folder / "pairs").iterdir()] == ["before-training.jsonl"]
    assert run.rows[0]["cai_before"]["asked"] == 49
    kept = run.rows[0]["cai_before"]["kept"]
    assert [row["cai"]["pairs"] for row in run.rows] == [kept, kept]
    assert all("asked" not in row["cai"] for row in run.rows)
    assert "cai_before" not in run.rows[1]


def test_a_model_that_refuses_everything_is_not_trained(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    off = federation("off").fit()
    on = federation("on", **made(files, reviser={"openings": [""]}))
    with pytest.warns(UserWarning, match=r"round 1: no pair came of 8 .*\(8 refused\); the server"):
        on.trainer.fit(on.module, datamodule=on.data)
    assert torch.equal(on.adapter, off.adapter)
    assert on.rows[1]["cai"]["dropped"] == {"refused": 8}
    assert on.rows[1]["cai"]["sft_steps"] == 0


@pytest.mark.parametrize(
    ("floor", "openings", "trains"),
    [(100.0, None, True), (50.0, [""], False)],
    ids=["refuses too little", "refuses enough"],
)
def test_the_adaptive_regime_trains_only_a_model_that_refuses_too_little(
    federation: FederationMaker,
    files: dict[str, str],
    floor: float,
    openings: list[str] | None,
    trains: bool,
) -> None:
    adaptive = {"regime": "adaptive", "refusal_floor": floor, "num_probe": 5, "probe_every": 2}
    run = federation("run", **made(files, reviser={"openings": openings}, **adaptive)).fit()
    record = run.rows[0]["cai"]
    assert record["refusal_rate_before"] == (0.0 if trains else 100.0)
    assert (record["sft_steps"] > 0) is trains
    assert ("asked" in record) is trains
    assert ("refusal_rate_after" in record) is trains
    assert record["tokens_generated"] > 0


def test_the_adaptive_regime_stops_as_soon_as_the_model_refuses_enough(
    federation: FederationMaker, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([10.0, 40.0, 90.0, 99.0])  # the floor is 90
    monkeypatch.setattr(Reviser, "refusal_rate", lambda *_, **__: (next(rates), 3, 4))
    settings = ready(files, regime="adaptive", iterations=14, num_probe=5, probe_every=2)
    settings["data"]["cai"] = CaiAugmentation(
        prompts=files["prompts"], pairs=files["pairs"], batch_size=4
    )
    record = federation("run", **settings).fit().rows[0]["cai"]
    assert record["refusal_rate_before"] == 10.0
    assert record["refusal_rate_after"] == 90.0
    assert (record["sft_steps"], record["dpo_steps"]) == (4, 0)
    assert (record["tokens_generated"], record["tokens_read"]) == (9, 12)


# ---- interruptions -------------------------------------------------------------------------------


class EveryServerStep(Checkpoint, ServerVisitListener):
    """Keeps a checkpoint of every step of the server, and of the last step before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.doings: list[str] = []

    def on_server_progress(self, trainer: Trainer, doing: str) -> None:
        self.doings.append(doing)

    def on_server_step(self, trainer: Trainer, num_done: int) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{num_done}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, _m: Any, _o: Any, batch: Any, _i: int) -> None:
        if batch.key.ends_visit and not batch.key.is_server_visit:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-before.ckpt")


@pytest.mark.parametrize("kind", ["ready", "renewed", "once", "adaptive", "scaffold", "central"])
def test_a_visit_resumed_from_any_of_its_steps_is_the_visit_that_never_was_cut(
    federation: FederationMaker, files: dict[str, str], kind: str, tmp_path: Path
) -> None:
    def settings() -> dict[str, Any]:
        adaptive = {"regime": "adaptive", "refusal_floor": 100.0, "num_probe": 5, "probe_every": 2}
        made_here = {
            "ready": lambda: ready(files),
            "renewed": lambda: made(files, iterations=12),
            "once": lambda: made(files, data={"renew": False}),
            "adaptive": lambda: made(files, iterations=8, **adaptive),
            "scaffold": lambda: ready(files),
            "central": lambda: ready(files),
        }[kind]()
        if kind == "scaffold":
            made_here["rounds"]["client_drift"] = Scaffold()
        if kind == "central":
            made_here["rounds"]["mode"] = "central"
        return with_dropout(made_here)

    saving = EveryServerStep(tmp_path)
    whole = federation("whole", callbacks=(saving,), **settings()).fit()
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    steps = [row["cai"]["sft_steps"] + row["cai"]["dpo_steps"] for row in whole.rows]
    inside = [file for file in checkpoints if "before" not in file.name]
    assert len(inside) == sum(steps) - 2 >= 4  # the last of a visit is followed by validation
    for checkpoint in checkpoints[:: 1 if kind == "ready" else 3]:
        name = f"from {checkpoint.stem}"
        shutil.copytree(whole.folder, whole.folder.parent / name)
        resumed = federation(name, **settings()).fit(ckpt_path=checkpoint)
        assert torch.equal(resumed.adapter, whole.adapter), name
        assert resumed.rows == whole.rows, name
        assert resumed.trainer.global_step == whole.trainer.global_step
        loops = [run.trainer.fit_loop.epoch_loop for run in (resumed, whole)]
        assert loops[0]._batches_that_stepped == loops[1]._batches_that_stepped, name
        adapter = Path("adapter") / "adapter_model.safetensors"
        assert (resumed.folder / adapter).read_bytes() == (whole.folder / adapter).read_bytes()


@pytest.mark.slow
def test_a_run_killed_inside_its_server_visits_is_the_run_that_never_was(
    tiny_gpt2: Path, conversations: Path, files: dict[str, str], tmp_path: Path
) -> None:
    def train(folder: str, *options: str) -> int:
        paths = [tiny_gpt2, conversations, tmp_path / folder]
        script = Path(__file__).with_name("killed_run.py")
        server = Path(files["prompts"]).parent
        return run_python(script, *paths, "--server", server, *options).returncode

    assert train("whole") == 0
    assert train("killed", "--kill-server", "2") == -signal.SIGKILL
    assert train("killed", "--resume", "--kill-server", "5") == -signal.SIGKILL
    assert train("killed", "--resume") == 0
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    for file in ("adapter/adapter_model.safetensors", "pairs/round-0001.jsonl"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    rows = [
        [without_seconds(row) for row in RoundLog(folder / "rounds.jsonl").read()]
        for folder in (killed, whole)
    ]
    assert rows[0] == rows[1]
    assert all(row["cai"]["dpo_steps"] > 0 for row in rows[0])


@pytest.mark.parametrize(
    "trainer",
    [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.01}],
    ids=["accumulated", "bf16", "clipped"],
)
def test_a_visit_resumes_under_other_ways_to_train(
    federation: FederationMaker, files: dict[str, str], tmp_path: Path, trainer: dict[str, Any]
) -> None:
    plain = federation("plain", **with_dropout(ready(files))).fit()
    settings = {**with_dropout(ready(files)), "trainer": trainer}
    whole = federation("whole", callbacks=(EveryServerStep(tmp_path),), **settings).fit()
    assert not torch.equal(whole.adapter, plain.adapter)
    for step in ("0-1", "1-5"):
        shutil.copytree(whole.folder, whole.folder.parent / f"from {step}")
        settings = {**with_dropout(ready(files)), "trainer": trainer}
        resumed = federation(f"from {step}", **settings).fit(ckpt_path=tmp_path / f"{step}.ckpt")
        assert torch.equal(resumed.adapter, whole.adapter)
        assert resumed.rows == whole.rows


def test_a_visit_that_lost_its_pairs_cannot_go_on(
    federation: FederationMaker, files: dict[str, str], tmp_path: Path
) -> None:
    saving = EveryServerStep(tmp_path)
    whole = federation("whole", callbacks=(saving,), **made(files, iterations=20)).fit()
    shutil.rmtree(whole.folder / "pairs")
    again = federation("whole", **made(files, iterations=20))
    with pytest.raises(ValueError, match=r"round-0001.jsonl is missing.*; resume from an earlier"):
        again.fit(ckpt_path=tmp_path / "0-1.ckpt")


def test_rules_may_change_between_rounds_and_not_inside_one(
    federation: FederationMaker, files: dict[str, str], tmp_path: Path
) -> None:
    federation("whole", callbacks=(EveryServerStep(tmp_path),), **ready(files)).fit()
    with pytest.raises(ValueError, match=r"cai.beta was 0.1 and is 0.3"):
        federation("whole", **ready(files, beta=0.3)).fit(ckpt_path=tmp_path / "0-2.ckpt")
    with pytest.raises(ValueError, match=r"federated.cai was 'cheap' and is 'final'"):
        federation("whole", **ready(files, regime="final")).fit(ckpt_path=tmp_path / "0-2.ckpt")
    other = ready(files)
    other["data"]["cai"] = CaiAugmentation(pairs=files["helpful"], batch_size=4)
    with pytest.raises(ValueError, match=r"data.cai.samples was"):
        federation("whole", **other).fit(ckpt_path=tmp_path / "0-2.ckpt")


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_average(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    from safetensors.torch import load_file

    off = federation("off", trainer={"max_epochs": 1}).fit()
    on = federation("on", **ready(files, sft_learning_rate=1e30))
    message = r"step 2 of the server's sft in round 1 has the loss (nan|inf) .*pairs.jsonl, line"
    with pytest.raises(ValueError, match=message):
        on.fit()
    assert torch.equal(on.module.flat_adapter().read(), off.adapter)
    kept, expected = (
        load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (on, off)
    )
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_an_adapter_that_is_no_number_stops_the_run_where_it_happened(
    federation: FederationMaker, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model is asked something next, in the adaptive regime."""
    step, taken = ServerVisit._take_step, []

    def spoil(visit: ServerVisit, *args: Any) -> None:
        taken.append(visit)
        if len(taken) == 2:
            rate = ConstitutionalTraining.learning_rate
            monkeypatch.setattr(ConstitutionalTraining, "learning_rate", lambda *_: float("inf"))
            try:
                return step(visit, *args)
            finally:
                monkeypatch.setattr(ConstitutionalTraining, "learning_rate", rate)
        return step(visit, *args)

    monkeypatch.setattr(ServerVisit, "_take_step", spoil)
    monkeypatch.setattr(Reviser, "refusal_rate", lambda *_, **__: (0.0, 1, 1))
    settings = ready(files, regime="adaptive", num_probe=5, probe_every=1)
    settings["data"]["cai"] = CaiAugmentation(
        prompts=files["prompts"], pairs=files["pairs"], batch_size=4
    )
    with pytest.raises(
        ValueError, match=r"step 2 of the server's sft in round 1 leaves an adapter"
    ):
        federation("on", **settings).fit()


def test_pairs_made_before_training_may_be_none(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    run = federation("run", **made(files, data={"renew": False}, reviser={"openings": [""]}))
    with pytest.warns(UserWarning, match=r"before training: no pair came of 49 red-team prompts"):
        run.trainer.fit(run.module, datamodule=run.data)
    assert run.rows[0]["cai"]["sft_steps"] == 0


# ---- settings that do not fit --------------------------------------------------------------------


def test_rules_and_data_of_the_training_belong_together(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    settings = ready(files)
    with pytest.raises(ValueError, match=r"only data.cai is given"):
        federation("data", data=settings["data"]).fit()
    with pytest.raises(ValueError, match=r"only federated.cai is given"):
        federation("rules", rounds=settings["rounds"]).fit()


def test_clients_on_their_own_have_no_server(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    settings = ready(files)
    settings["rounds"]["mode"] = "local"
    with pytest.raises(ValueError, match="'local' has no global adapter for the server to train"):
        federation("local", **settings)


def test_more_held_out_prompts_than_there_are_is_refused_before_training(
    federation: FederationMaker, files: dict[str, str]
) -> None:
    settings = made(files, regime="adaptive", num_probe=49)
    with pytest.raises(ValueError, match=r"has 49 red-team prompts, and 49 are held out"):
        federation("run", **settings).fit()
