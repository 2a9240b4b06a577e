"""What the filter leaves each client, row by row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from word_guard import WordGuard

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.data.filtered import FilterRow
from fedsafe.federated.partition import IID, Natural
from fedsafe.safety import score_cache
from fedsafe.safety.filter import SafetyFilter
from fedsafe.safety.guard import for_each

HELD_BY = {"ada": 6, "bob": 3, "cyd": 4}
UNSAFE = {"ada": (1, 4), "bob": (0, 1, 2), "cyd": ()}
"""Which samples of each client hold the word."""

DataMaker = Callable[..., FederatedDataModule]


@pytest.fixture
def conversations(tmp_path: Path, own_cache: Path) -> Path:
    """13 samples; the word `red` makes 5 of them unsafe, the labels are right but for three."""
    rows = [
        {
            "prompt": f"{client} asks {number}",
            "response": "red wine" if number in UNSAFE[client] else "blue sky",
            "client": client,
            "label": "unsafe" if number in UNSAFE[client] else "safe",
        }
        for client, size in HELD_BY.items()
        for number in range(size)
    ]
    rows[0]["label"] = rows[2]["label"] = "unsafe"  # misses
    rows[1]["label"] = "safe"  # a false alarm
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def load(conversations: Path, tiny_gpt2: Path) -> DataMaker:
    def make(
        policy: str | None = "drop", *, guard: WordGuard | None = None, **settings: Any
    ) -> FederatedDataModule:
        rule = {k: settings.pop(k) for k in ("threshold", "record_text") if k in settings}
        safety = policy and SafetyFilter(
            guard or WordGuard("red"), policy=policy, max_unsafe_share=1.0, **rule
        )
        defaults = {"partition": Natural(), "tokenizer": str(tiny_gpt2), "validation_share": 0.0}
        data = FederatedDataModule(str(conversations), filter=safety, **(defaults | settings))
        data.setup("fit")
        return data

    return make


def texts(data: FederatedDataModule) -> list[list[str]]:
    """What each client trains on."""
    held = [data.partition.samples_of(k).tolist() for k in range(len(data.partition))]
    return [[data.tokenizer.decode(data.store[i][0]) for i in samples] for samples in held]


def written(data: FederatedDataModule, folder: Path) -> list[dict[str, Any]]:
    data.write_verdicts(folder)
    assert sorted(f.name for f in folder.glob("filter.*")) == ["filter.json", "filter.jsonl"]
    return [json.loads(line) for line in (folder / "filter.jsonl").read_text().splitlines()]


def test_dropped_samples_leave_their_clients_and_nothing_else_moves(load: DataMaker) -> None:
    with pytest.warns(UserWarning, match=r"1 of 3 clients have no sample left .* no part: bob$"):
        dropped = texts(load("drop"))
    assert dropped == [[t for t in own if "red" not in t] for own in texts(load(None))]
    assert [len(own) for own in dropped] == [4, 0, 4]


def test_refused_samples_keep_their_places_with_a_refusal(load: DataMaker) -> None:
    data, plain = load("refuse"), load(None)
    repaired, original = texts(data), texts(plain)
    assert data.partition.sizes.tolist() == plain.partition.sizes.tolist() == [6, 3, 4]
    assert data.filter is not None
    for own, before in zip(repaired, original, strict=True):
        for text, old in zip(own, before, strict=True):
            assert ("red" in old) == (text != old)
            assert text.split("Assistant:")[0] == old.split("Assistant:")[0]
    answers = {t.split("Assistant: ")[1] for own in repaired for t in own} - {"blue sky</s>"}
    assert answers <= {f"{refusal}</s>" for refusal in data.filter._refusals}
    assert texts(load("refuse")) == repaired, "the draw is not stable"
    assert texts(load("refuse", seed=1)) != repaired


def test_kept_samples_are_only_noted(load: DataMaker, tmp_path: Path) -> None:
    data = load("keep")
    assert texts(data) == texts(load(None))
    rows = written(data, tmp_path / "run")
    assert {row["action"] for row in rows} == {"kept"}
    assert sum(row["unsafe"] > 0.5 for row in rows) == 5


def test_a_guard_that_finds_nothing_changes_nothing(load: DataMaker) -> None:
    data, plain = load("drop", guard=WordGuard()), load(None)
    assert data.partition.digest() == plain.partition.digest()
    one, other = data.identity(), plain.identity()
    assert {name for name in one if one[name] != other[name]} == {"data.filter"}


@pytest.mark.parametrize(("policy", "action"), [("drop", "dropped"), ("refuse", "refused")])
@pytest.mark.filterwarnings("ignore:.*no sample left")
def test_the_record_has_a_line_a_sample_client_after_client(
    load: DataMaker, conversations: Path, tmp_path: Path, policy: str, action: str
) -> None:
    rows = written(load(policy), tmp_path / "run")
    assert [row["client"] for row in rows] == [c for c, n in HELD_BY.items() for _ in range(n)]
    assert [row["row"] for row in rows] == list(range(1, 14))
    assert rows[1] == {
        "client": "ada",
        "source": str(conversations),
        "row": 2,
        "unsafe": 0.9,
        "categories": ["S1"],
        "guard": "word-guard",
        "action": action,
    }
    assert [row["action"] for row in rows] == [
        action if row["unsafe"] == 0.9 else "kept" for row in rows
    ]


def test_a_shortened_conversation_and_an_odd_probability_are_recorded(
    load: DataMaker, tmp_path: Path
) -> None:
    class Narrow(WordGuard):
        def judge(self, conversations):
            judged = super().judge(conversations)
            return [v._replace(unsafe=1 / 3, shortened=v.unsafe > 0.5) for v in judged]

    data = load("keep", guard=Narrow("red"))
    rows = written(data, tmp_path)
    assert [row["row"] for row in rows if row.get("shortened")] == [2, 5, 7, 8, 9]
    assert {row["unsafe"] for row in rows} == {0.333333}
    assert data.filter_report is not None
    assert data.filter_report.num_shortened == 5


def test_text_is_recorded_where_asked_for(load: DataMaker, tmp_path: Path) -> None:
    rows = written(load("keep", record_text=True), tmp_path)
    assert rows[1]["messages"] == [
        {"role": "user", "content": "ada asks 1"},
        {"role": "assistant", "content": "red wine"},
    ]
    assert all("messages" not in row for row in written(load("keep"), tmp_path))


@pytest.mark.parametrize("policy", ["drop", "refuse"])
@pytest.mark.filterwarnings("ignore:.*no sample left")
def test_held_out_samples_are_judged_too(load: DataMaker, tmp_path: Path, policy: str) -> None:
    settings = {"validation_share": 0.5, "partition": IID(2)}
    plain, data = load(None, **settings), load(policy, **settings)
    before, after = (
        [run.tokenizer.decode(run.store[i][0]) for i in run._validation] for run in (plain, data)
    )
    unsafe = ["red wine" in text for text in before]
    assert 0 < sum(unsafe) < len(before) == 6
    assert not any("red wine" in text for text in after)
    assert len(after) == (6 if policy == "refuse" else 6 - sum(unsafe))
    held_out = [row for row in written(data, tmp_path) if row["client"] is None]
    assert [row["unsafe"] == 0.9 for row in held_out] == unsafe
    assert data.filter_report is not None
    assert data.filter_report.held_out[1:3] == (6, sum(unsafe))


def test_a_filter_that_empties_validation_says_so(load: DataMaker) -> None:
    seeds = (s for s in range(99) if "red" in held_out_text(load(None, **held_out(s))))
    with pytest.warns(UserWarning, match="filter leaves no sample for validation"):
        data = load("drop", **held_out(next(seeds)))
    assert data.num_validation_samples == 0
    assert data.val_dataloader() == []


def held_out(seed: int) -> dict[str, Any]:
    """One sample is held out; which one, the seed decides."""
    return {"validation_share": 0.08, "partition": IID(1), "seed": seed}


def held_out_text(data: FederatedDataModule) -> str:
    (number,) = data._validation
    return data.tokenizer.decode(data.store[number][0])


def test_nothing_left_is_an_error(load: DataMaker) -> None:
    with pytest.raises(ValueError, match=r"leaves none of 13 samples, .*; raise its threshold"):
        load("drop", threshold=0.0)


def test_too_much_unsafe_stops_before_anything_is_dropped(
    conversations: Path, tiny_gpt2: Path
) -> None:
    data = FederatedDataModule(
        str(conversations),
        IID(2),
        SafetyFilter(WordGuard("red"), max_unsafe_share=0.3),
        tokenizer=str(tiny_gpt2),
    )
    with pytest.raises(ValueError, match=r"calls 5 of 13 samples unsafe \(38%\), more than max_un"):
        data.setup("fit")


@pytest.mark.filterwarnings("ignore:.*no sample left")
def test_the_report_counts_by_client(load: DataMaker) -> None:
    report = load("drop").filter_report
    assert report is not None
    assert FilterRow._fields[1:6] == ("judged", "unsafe", "dropped", "refused", "left")
    assert FilterRow._fields[6:] == ("hits", "false_alarms", "misses")
    assert report.clients == [
        FilterRow("ada", 6, 2, 2, 0, 4, 1, 1, 2),
        FilterRow("bob", 3, 3, 3, 0, 0, 3, 0, 0),
        FilterRow("cyd", 4, 0, 0, 0, 4, 0, 0, 0),
    ]
    assert report.total == FilterRow("all 3", 13, 5, 5, 0, 8, 4, 1, 2)
    assert [row.precision for row in report.clients] == [0.5, 1.0, None]
    assert [row.recall for row in report.clients] == [1 / 3, 1.0, None]
    assert load(None).filter_report is None


@pytest.mark.filterwarnings("ignore:.*no sample left")
def test_the_table_of_clients_shows_what_is_left_of_them(load: DataMaker) -> None:
    shares = {p: [row.harmful_share for row in load(p).client_rows()] for p in ("drop", "refuse")}
    assert shares == {"drop": [0.5, None, 0.0], "refuse": [2 / 6, 0.0, 0.0]}
    sizes = [(row.samples, row.tokens > 0) for row in load("drop").client_rows()]
    assert sizes == [(4, True), (0, False), (4, True)]


def test_a_repaired_sample_without_room_for_its_answer_is_dropped_and_reported(
    load: DataMaker, conversations: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.chat_template = (  # far in for a refusal on ada's questions, near for all else
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if 'wine' not in m.content and 'sky' not in m.content and 'ada' in messages[0].content"
        " %}{{ 'x' * 90 }}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }} {% endif %}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = {"tokenizer": str(tmp_path / "tokenizer"), "max_length": 80}
    with pytest.warns(
        UserWarning, match="left out 2 of 5 rows.*\n.*line 2: no answer token within"
    ):
        data = load("refuse", **settings)
    assert data.partition.sizes.tolist() == [4, 3, 4]
    actions = [row["action"] for row in written(data, tmp_path)]
    assert [n for n, action in enumerate(actions) if action == "dropped"] == [1, 4]
    assert [n for n, action in enumerate(actions) if action == "refused"] == [6, 7, 8]


def test_the_training_set_with_repaired_rows_travels_to_a_worker(load: DataMaker) -> None:
    import pickle

    store = load("refuse").store
    copy = pickle.loads(pickle.dumps(store))
    assert len(copy) == len(store) == 18
    assert all(np.array_equal(copy[i][0], store[i][0]) for i in range(18))


@pytest.mark.filterwarnings("ignore:.*no sample")
def test_the_counts_are_written_for_machines(load: DataMaker, tmp_path: Path) -> None:
    data = load("drop", threshold=0.25, validation_share=0.08)
    data.write_verdicts(tmp_path)
    counts = json.loads((tmp_path / "filter.json").read_text())
    report = data.filter_report
    assert report is not None
    assert counts.pop("clients") == [row._asdict() for row in report.clients]
    for name, row in (("total", report.total), ("held_out", report.held_out)):
        assert {"client": row.client, **counts.pop(name)} == row._asdict()
    about = {"guard": "word-guard", "policy": "drop", "threshold": 0.25}
    assert counts == {**about, "shortened": 0, "unjudged": 0}


@pytest.mark.filterwarnings("ignore:.*no sample left")
def test_samples_are_judged_a_slice_at_a_time_with_the_same_verdicts(
    load: DataMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = written(load("refuse"), tmp_path)
    assert "Judging" not in capsys.readouterr().err
    monkeypatch.setattr("fedsafe.data.filtered.CHUNK_SIZE", 5)
    monkeypatch.setattr(score_cache, "cache_dir", lambda: tmp_path / "another")
    guard = WordGuard("red")
    assert written(load("refuse", guard=guard), tmp_path) == whole
    assert [len(seen) for seen in guard.seen] == [5, 5, 3]
    assert "Judging with word-guard" in capsys.readouterr().err


def test_the_guard_is_released_when_all_is_judged(load: DataMaker) -> None:
    calls = []

    class Spy(WordGuard):
        def judge(self, conversations):
            calls.append("judge")
            return super().judge(conversations)

        def release(self):
            calls.append("release")

    load("keep", guard=Spy("red"))
    assert calls == ["judge", "release"]


class SpeechlessGuard(WordGuard):
    """Cannot judge what holds the word sky."""

    def judge(self, conversations):
        return for_each(self._verdict, (each[-1]["content"] for each in conversations))

    def _verdict(self, text):
        if "sky" in text:
            raise ValueError("it makes a prompt of 9 tokens")
        return super()._verdict(text)


def test_samples_that_cannot_be_judged_are_named_by_their_lines_and_not_by_their_text(
    load: DataMaker,
) -> None:
    message = (
        r"8 of 13 rows cannot be used:\n"
        r"  .*rows.jsonl, line 1: the guard word-guard cannot judge it: it makes a prompt of 9 .*\n"
        r"(  .*, line (3|4|6|10): .*\n){4}  and 3 more\n.* set on_bad_row: skip"
    )
    with pytest.raises(ValueError, match=message) as caught:
        load("drop", guard=SpeechlessGuard("red"))
    assert "sky" not in str(caught.value)


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.filterwarnings("ignore:.*no sample left")
def test_samples_that_cannot_be_judged_leave_their_clients(
    load: DataMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("fedsafe.data.filtered.CHUNK_SIZE", chunk)
    rejected = tmp_path / "rejected.jsonl"
    monkeypatch.setattr(FederatedDataModule, "_rejected_file", lambda self: rejected)
    with pytest.warns(UserWarning, match=r"left out 8 of 13 rows \(all are listed in"):
        data = load("keep", guard=SpeechlessGuard("red"), on_bad_row="skip")
    assert data.partition.sizes.tolist() == [2, 3, 0]
    assert all("red wine" in text for own in texts(data) for text in own)
    rows = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [row["row"] for row in rows] == [1, 3, 4, 6, 10, 11, 12, 13]
    assert {row["reason"] for row in rows} == {
        "the guard word-guard cannot judge it: it makes a prompt of 9 tokens"
    }
    assert [row["row"] for row in written(data, tmp_path / "run")] == [2, 5, 7, 8, 9]
    report = data.filter_report
    assert report is not None
    assert (report.num_unjudged, report.total) == (8, FilterRow("all 3", 5, 5, 0, 0, 5, 4, 1, 0))


def test_held_out_samples_that_cannot_be_judged_are_left_out_too(load: DataMaker) -> None:
    settings = {"validation_share": 0.5, "partition": IID(2)}
    plain = load(None, **settings)
    before = [plain.tokenizer.decode(plain.store[i][0]) for i in plain._validation]
    with pytest.warns(UserWarning, match="left out 8 of 13 rows"):
        data = load("keep", guard=SpeechlessGuard(), on_bad_row="skip", **settings)
    after = [data.tokenizer.decode(data.store[i][0]) for i in data._validation]
    assert after == [text for text in before if "sky" not in text]
    assert 0 < len(after) < len(before)


def test_data_of_which_nothing_can_be_judged_is_an_error(
    load: DataMaker, conversations: Path
) -> None:
    conversations.write_text('{"prompt": "a", "response": "sky", "client": "ada"}\n' * 2)
    with pytest.raises(ValueError, match=r"no row of .*rows.jsonl can be used:\n.*cannot judge it"):
        load("drop", guard=SpeechlessGuard("red"), on_bad_row="skip")


def test_a_sample_that_cannot_be_judged_keeps_its_line_where_others_were_left_out(
    load: DataMaker, conversations: Path
) -> None:
    asked = [("a", "red wine"), ("b", ""), ("far " * 30, "red"), ("d", "red"), ("e", "blue sky")]
    rows = [{"prompt": text, "response": said, "client": "ada"} for text, said in asked]
    conversations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"guard": SpeechlessGuard("red"), "max_length": 60, "on_bad_row": "skip"}
    with pytest.warns(UserWarning, match="left out 1 of 3 rows:\n.*line 5: the guard word-guard"):
        data = load("keep", **settings)
    assert data.partition.sizes.tolist() == [2]
