import math
from pathlib import Path

import pytest

from fedsafe.federated.round_log import RoundLog, cai_costs


@pytest.fixture
def log(tmp_path: Path) -> RoundLog:
    log = RoundLog(tmp_path / "run" / "rounds.jsonl")
    for number in (1, 2, 3):
        log.append({"round": number, "loss": number / 3})
    return log


def test_rounds_are_read_as_they_were_written(log: RoundLog) -> None:
    assert log.read() == [{"round": n, "loss": n / 3} for n in (1, 2, 3)]
    assert log.file.read_text().count("\n") == 3


def test_a_log_that_was_never_written_is_empty(tmp_path: Path) -> None:
    log = RoundLog(tmp_path / "rounds.jsonl")
    log.keep(0)
    assert log.read() == []
    assert not log.file.exists()


def test_numbers_that_json_lacks_become_null(log: RoundLog) -> None:
    log.append({"loss": math.nan, "clients": [{"loss": math.inf, "steps": 3}]})
    assert log.read()[-1] == {"loss": None, "clients": [{"loss": None, "steps": 3}]}


def test_a_last_line_that_a_kill_cut_short_is_left_out(log: RoundLog) -> None:
    with log.file.open("a") as file:
        file.write('{"round": 4, "lo')
    assert [row["round"] for row in log.read()] == [1, 2, 3]
    log.keep(3)
    log.append({"round": 4})
    assert [row["round"] for row in log.read()] == [1, 2, 3, 4]


def test_keep_cuts_back_what_a_resumed_run_writes_again(log: RoundLog) -> None:
    log.keep(1)
    log.append({"round": 2, "loss": 9.0})
    assert [row["loss"] for row in log.read()] == [1 / 3, 9.0]


def test_keeping_more_rounds_than_there_are_is_refused(log: RoundLog) -> None:
    with pytest.raises(ValueError, match=r"has 3 rounds, but the checkpoint was written after 4"):
        log.keep(4)
    assert len(log.read()) == 3


def test_costs_of_constitutional_training_add_up_over_the_rounds() -> None:
    visit = {"asked": 8, "kept": 5, "sft_steps": 3, "dpo_steps": 2, "seconds": 1.5}
    visit |= {"tokens_generated": 10, "tokens_read": 20, "tokens_trained": 30}
    skipped = {"sft_steps": 0, "dpo_steps": 0, "tokens_generated": 4, "seconds": 0.5}
    before = {"asked": 40, "kept": 30, "tokens_generated": 100, "seconds": 2.0}
    costs = cai_costs([{"cai": visit, "cai_before": before}, {"cai": skipped}, {"round": 3}])
    assert costs["visits"] == 1
    assert (costs["asked"], costs["kept"]) == (48, 35)
    assert (costs["sft_steps"], costs["dpo_steps"]) == (3, 2)
    assert costs["tokens_generated"] == 114
    assert costs["seconds"] == 4.0
