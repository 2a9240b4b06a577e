"""What the page of a run says."""

import json
import math
from pathlib import Path

import pytest
from page_document import Document, page_of
from run_folders import (
    cai_visit,
    filter_counts,
    round_row,
    write_json,
    write_lines,
    write_run,
)

from fedsafe.page.write import write_report


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Document:
    return page_of(write_run(tmp_path_factory.mktemp("pages") / "my-run"))


@pytest.fixture(scope="module")
def run_text(run_page: Document) -> str:
    return run_page.text


def test_the_first_words_of_a_run_are_what_training_did(run_text: str) -> None:
    text = run_text
    start = text.index("3 rounds of federated training with 2 clients took 4.5 s.")
    assert start < 600
    said = text[start:]
    assert (
        "After training the model refuses 44.2 % of harmful requests (AdvBench), down from 99.0 %"
        in said
    )
    assert "the model scores 5.25 of 10 with the judge (MT-Bench), down from 6.50 before" in said
    assert "The guard owl-guard called 25 % of the clients' samples unsafe." in said
    assert "The server trained on 18 revised answers of the model, in 2.2 s." in said
    assert "my-run" in text[:100]


def test_a_runs_page_has_every_part(run_page: Document) -> None:
    page = run_page
    for words in (
        "AdvBench: harmful requests refused 99.0 % 44.2 % -54.8",
        "HHH: better answer chosen (summed log-probability) [honest]",
        "AdvBench the judge timed out 1 of 14",
        "round (0 is before training)",
        "refused: 98.0 % before training, 40.0 % after round 3",
        "Guard owl-guard, policy drop, unsafe from 0.5.",
        "client judged unsafe dropped refused left precision recall ada 20 5 4 1 16 80% 50%",
        "Loss 0.33 on held-out samples, first: 1.00",
        "On the wire 15.0 MB 6.0 MB of it up",
        "Rounds 3 2 clients in each",
        "2 samples judged by beginning and end alone.",
        "dropped: refused 102",
        "steps, SFT + DPO 9 + 6",
        "share of the run's time 50%",
        "1 visit failed (x).",
        "12 of 14 items got worse by training (10 shown)",
        "Constitutional training: 1 red responses and their revisions",
        "fedsafe fit --config 'my runs/a.yaml'",
        "CPU, 2 threads",
        "seed_everything: 0",
    ):
        assert words in page.text, words
    assert len(page.all("svg")) == 7


def test_what_a_run_does_not_have_is_said_and_does_not_stop_the_page(tmp_path: Path) -> None:
    row = round_row(1, clients=["ada"])
    write_lines(tmp_path / "rounds.jsonl", [row])
    page = page_of(tmp_path)
    for words in (
        "1 round of federated training with 1 client",
        "no benchmark was asked",
        "How helpful it is was not measured.",
        "Not measured. fedsafe test with data.benchmarks",
        "the callback SafetyProbe does",
        "This run had no safety filter",
        "This run had no constitutional training.",
        "No replies are kept here yet",
        "run.json is missing",
        "no config.yaml",
    ):
        assert words in page.text, words


def test_the_commands_of_a_run_and_of_its_tests_are_there_once(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path)).text
    assert text.count("fedsafe fit --config 'my runs/a.yaml'") == 1
    assert text.count("fedsafe test --config 'my tests/b.yaml'") == 1


def test_without_held_out_samples_the_loss_is_that_of_training(tmp_path: Path) -> None:
    write_lines(tmp_path / "rounds.jsonl", [round_row(n, clients=["ada"]) for n in (1, 2)])
    assert "Loss 1.00 in training, first: 2.00" in page_of(tmp_path).text


def test_constitutional_training_before_the_first_round_is_shown_and_counted(
    tmp_path: Path,
) -> None:
    visits = {"cai": cai_visit(), "cai_before": cai_visit(asked=9, pairs=2, dropped={"endless": 7})}
    write_lines(tmp_path / "rounds.jsonl", [round_row(1, clients=["ada"], **visits)])
    text = page_of(tmp_path).text
    assert "before 9 2 3 2 0.500" in text
    assert "1 40 6 3 2 0.500" in text
    assert "dropped: endless 7" in text
    assert "pairs trained on, all rounds 8" in text
    assert "asked: 9 before training, 40 after round 1." in text


def test_a_run_killed_before_its_first_round_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rounds: 3\n")
    assert "No round has finished yet" in page_of(tmp_path).text


def test_a_run_killed_while_it_wrote_a_round_shows_the_whole_ones(tmp_path: Path) -> None:
    write_run(tmp_path)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "clie')
    assert "3 rounds of federated training" in page_of(tmp_path).text


def test_an_evaluation_without_training_has_no_parts_of_training(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"base/advbench/refusal_rate": 99.0})
    page = page_of(tmp_path)
    assert "This folder holds an evaluation, and no training." in page.text
    assert "The base alone refuses 99.0 % of harmful requests (AdvBench)." in page.text
    assert "The trained model was not measured." in page.text
    assert "Safety filter" not in page.text


def test_measures_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    rows = [
        round_row(n, clients=["ada"], **{"val/loss": value, "val/advbench/refusal_rate": value})
        for n, value in enumerate((None, 1.5, None, math.nan), 1)
    ]
    rows[1]["clients"][0] |= {"update_norm": None, "cosine_to_mean": None, "loss": None}
    rows[2]["loss"] = None
    write_lines(tmp_path / "rounds.jsonl", rows)
    write_json(tmp_path / "before.json", {"val/advbench/refusal_rate": math.nan})
    write_json(tmp_path / "results.json", {"test/advbench/refusal_rate": None})
    page = page_of(tmp_path)
    assert "refused: 1.5 % after round 2." in page.text
    assert "nan" not in page.text


def test_a_run_of_clients_that_never_average_has_a_page(tmp_path: Path) -> None:
    rows = [round_row(n, clients=["ada", "bob"]) for n in (1, 2)]
    for row in rows:
        for visit in row["clients"]:
            del visit["cosine_to_mean"]
    rows[0]["clients"] = [{"client": "ada", "status": "failed"}]
    write_lines(tmp_path / "rounds.jsonl", rows)
    assert "2 rounds of federated training with 2 clients" in page_of(tmp_path).text


def test_of_many_clients_the_largest_are_named_and_the_others_counted(tmp_path: Path) -> None:
    names = tuple(f"client-{n}" for n in range(40))
    page = page_of(write_run(tmp_path, clients=names))
    assert "16 smaller clients are in filter.json." in page.text
    assert "16 clients that came less often are left out." in page.text


def test_of_many_visits_the_last_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    names = [f"client-{n}" for n in range(90)]
    rows = [round_row(n, clients=names[: 85 + n]) for n in range(1, 6)]
    write_lines(tmp_path / "rounds.jsonl", rows)
    page = page_of(tmp_path)
    assert "The last 200 visits" in page.text
    assert f"{sum(range(86, 91)) - 200} earlier visits: see rounds.jsonl." in page.text
    assert "86 to 90 clients in each" in page.text
    assert len(page.all("tr")) < 230


def test_agreement_that_nothing_measured_is_not_known(tmp_path: Path) -> None:
    row = round_row(1, clients=["ada", "bob"])
    for visit in row["clients"]:
        visit |= {"cosine_to_mean": math.nan, "update_norm": math.nan}
    (tmp_path / "rounds.jsonl").write_text(json.dumps(row) + "\n")
    text = page_of(tmp_path).text
    assert "The cosine to the mean is not known. 2 visits without a known length (+)." in text
    assert "nan" not in text


def test_names_and_replies_from_right_to_left_are_kept_apart_from_the_page(tmp_path: Path) -> None:
    word = "إوزة\u200f"
    run = write_run(tmp_path, clients=(word, "bob"))
    reply = {"id": "advbench:0", "scores": {"refusal_rate": 0.0}}
    reply |= {"conversation": [{"role": "user", "content": f"{word}\r\n!"}]}
    write_lines(run / "replies" / "advbench.jsonl", [reply])
    text = write_report(run).read_text(encoding="utf-8")
    assert "\ufffd" not in text
    assert f'<dd dir="auto">{word}\n!</dd>' in text
    assert f'<td class="words"><bdi>{word}</bdi></td>' in text


def test_a_run_inside_a_table_is_called_by_its_row(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "fl-fedavg-seed0" / "fit"))
    assert page.text.startswith("fl-fedavg-seed0 · Report of a run")


def test_the_page_of_a_server_names_what_came_late_and_how_to_repeat_it(tmp_path: Path) -> None:
    stray = {"client": "cyd", "status": "late", "reason": "its answer of round 1 came"}
    row = round_row(2, clients=["ada"], strays=[stray], **{"val/loss_start": 1.234})
    row["clients"].append({"client": "bob", "status": "late", "reason": "no answer within 9 s"})
    write_lines(tmp_path / "rounds.jsonl", [row])
    filtered = {"shortened": 0, "unjudged": 0, "threshold": None, "guard": "of each client"}
    counts = {"total": filter_counts(), "held_out": filter_counts(), "policy": "of each client"}
    write_json(tmp_path / "filter.json", {**filtered, **counts, "clients": [filter_counts("ada")]})
    (tmp_path / "config.yaml").write_text("fleet: {}")
    write_json(tmp_path / "run.json", {"command": ["fedsafe", "federate", "server", "--config"]})
    text = page_of(tmp_path).text
    assert "2 cyd late: its answer of round 1 came" in text
    assert "2 bob late: no answer within 9 s" in text
    assert "held-out loss before the round" in text
    assert "1.234" in text
    assert "Each client judged its own samples, with a guard and by a policy of its own." in text
    assert f"fedsafe federate server --config {tmp_path}/config.yaml --run_dir runs/again" in text
