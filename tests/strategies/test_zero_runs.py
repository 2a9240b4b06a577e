"""Federations under ZeRO on two ranks, against the same under DDP and in one process."""

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from federations import write_conversations
from peft import PeftModel
from ranks import STAND_INS, run_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsafe.model.module import LoraLM

sys.path.append(str(STAND_INS.parent / "federated"))
from ddp_cases import RESUMED, resume  # found once its folder is known
from zero_runs import CASES, MEASURED, PAIRS, SERVED, run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAGES = ("zero1", "zero2", "zero3")
EXACT = ("fedavg", "scaffold", "fedprox", "mixed", "checkpointed", RESUMED)
CLOSE = ("accumulated", "clipped", SERVED)


class Runs(NamedTuple):
    """Where the runs are, and what they were made from."""

    folder: Path
    base: Path
    path: Path

    def adapter(self, way: str, case: str) -> Tensor:
        return torch.load(self.folder / way / case / "adapter.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> Runs:
    folder = tmp_path_factory.mktemp("zero")
    path = folder / "conversations.jsonl"
    write_conversations(path)
    words = ("red", "blue", "green", "cat", "dog", "sun", "moon")
    rows = [
        {"prompt": f"{a} {b}", "chosen": f"no {a}", "rejected": f"take the {b} {a}"}
        for a in words
        for b in words[:2]
    ]
    (folder / PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = STAND_INS / "zero_runs.py"
    run_ranks(script, folder, tiny_gpt2, path, timeout_seconds=900)
    return Runs(folder, tiny_gpt2, path)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("stage", STAGES)
def test_zero_trains_bit_for_bit_what_ddp_trains(runs: Runs, stage: str, case: str) -> None:
    assert torch.equal(runs.adapter(stage, case), runs.adapter("ddp", case))


@pytest.mark.parametrize("case", CLOSE)
def test_zero1_accumulates_as_ddp_does_and_clips_within_rounding(runs: Runs, case: str) -> None:
    ours, theirs = runs.adapter("zero1", case), runs.adapter("ddp", case)
    if case == "clipped":  # DeepSpeed adds up the squares of the gradient in another order
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", CLOSE)
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_that_splits_gradients_rounds_otherwise_than_ddp(
    runs: Runs, stage: str, case: str
) -> None:
    """Parts of a step are averaged over ranks one by one and then added; DDP adds them first."""
    ours, theirs = runs.adapter(stage, case), runs.adapter("ddp", case)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_offloading_changes_nothing(runs: Runs, stage: str) -> None:
    there, here = runs.adapter(f"{stage}-offload", "fedavg"), runs.adapter(stage, "fedavg")
    assert torch.equal(there, here)


@pytest.mark.parametrize("stage", STAGES)
def test_offloaded_gradients_are_clipped_as_the_correction_left_them(
    runs: Runs, stage: str
) -> None:
    there, here = runs.adapter(f"{stage}-offload", "clipped"), runs.adapter(stage, "clipped")
    torch.testing.assert_close(there, here, atol=1e-6, rtol=0)
    assert not torch.allclose(here, runs.adapter(stage, "scaffold"), atol=1e-6)


@pytest.mark.parametrize("case", ["fedavg", "scaffold", "fedprox"])
def test_two_ranks_train_what_one_process_trains(runs: Runs, tmp_path: Path, case: str) -> None:
    run(tmp_path / case, CASES[case](), runs.base, runs.path, strategy=None)
    one = torch.load(tmp_path / case / "adapter.pt", weights_only=True)
    torch.testing.assert_close(runs.adapter("zero3", case), one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_zero_began_goes_on_in_one_process(
    runs: Runs, tmp_path: Path, stage: str
) -> None:
    """The checkpoint is from inside a visit: what the optimizer remembers matters."""
    checkpoints = runs.folder / stage / RESUMED / "checkpoints"
    shutil.copytree(checkpoints, tmp_path / "checkpoints")
    resume(tmp_path, base=runs.base, path=runs.path, strategy=None)
    here = torch.load(tmp_path / "adapter.pt", weights_only=True)
    torch.testing.assert_close(here, runs.adapter(stage, RESUMED), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", MEASURED)
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_measured_as_under_ddp(runs: Runs, stage: str, case: str) -> None:
    """Its checkpoint by `validate`, the files of its adapter by `test`; answers are the same."""
    ours, theirs = (
        json.loads((runs.folder / way / case / "measured.json").read_text())
        for way in (stage, "ddp")
    )
    assert ours == theirs
    assert len(ours["said"]) == 2
    assert set(ours["validated"][0]) == {"val/loss"}
    assert set(ours["tested"][0]) == {"test/loss"}
    assert ours["autocast"] == (case == "mixed")


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_is_trained_by_one_trainer_after_another(runs: Runs, stage: str) -> None:
    ours, theirs = runs.adapter(stage, "fedavg/more"), runs.adapter("ddp", "fedavg/more")
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stage", STAGES)
def test_the_adapters_files_give_peft_the_logits_of_the_run(runs: Runs, stage: str) -> None:
    files = runs.folder / stage / "fedavg" / "adapter"
    base = AutoModelForCausalLM.from_pretrained(runs.base)
    loaded = PeftModel.from_pretrained(base, str(files)).eval()
    module = LoraLM(str(runs.base), rank=4, alpha=8.0, attention="sdpa")
    module.configure_model()
    module.flat_adapter().write(runs.adapter(stage, "fedavg"))
    module.eval()
    ids = torch.tensor([[5, 9, 33, 20, 41]])
    with torch.no_grad():
        theirs, ours = loaded(input_ids=ids).logits, module.peft_model(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    with torch.no_grad(), loaded.disable_adapter():
        assert not torch.allclose(loaded(input_ids=ids).logits, ours, atol=1e-3)


def test_an_adapter_file_without_values_is_refused(runs: Runs) -> None:
    folder = runs.folder / "zero3" / "fedavg"
    said = (folder / "refusal.txt").read_text()
    assert "would be saved without values: 16 of 16 tensors are empty; gather them" in said
    assert not (folder / "by-hand").exists()
