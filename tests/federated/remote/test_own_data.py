import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from word_guard import WordGuard

from fedsafe.data.augmentation import CaiAugmentation
from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.federated.partition import Natural, SampleColumns
from fedsafe.federated.remote.own_data import OwnData
from fedsafe.federated.schedule import Schedule, Visit
from fedsafe.safety.filter import SafetyFilter

DataMaker = Callable[..., OwnData]

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def own_data(tiny_gpt2: Path, tmp_path: Path) -> DataMaker:
    """Make the data of the client `ada` from rows."""

    def make(rows: list[dict[str, Any]], client: str = "ada", **settings: Any) -> OwnData:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"validation_share": 0.0, "batch_size": 2, **settings}
        return OwnData(client, path=str(file), tokenizer=str(tiny_gpt2), **settings)

    return make


def rows_of(*clients: str | None) -> list[dict[str, Any]]:
    """A row for each name; None is a row without the field."""
    rows = [{"prompt": f"say {n}", "response": f"sun {n}"} for n in range(len(clients))]
    return [
        row if client is None else {**row, "client": client}
        for row, client in zip(rows, clients, strict=True)
    ]


def visit_to(data: OwnData, *, client: int = 0, **settings: Any) -> list[Any]:
    """The batches of a visit."""
    given = {"round_": 0, "num_rounds": 1, "number": 0, "num_micro": 1, "seed": 0}
    given |= {"local_steps": None, "local_epochs": 1, **settings}
    return list(data.batches(client=client, **given))


def texts(data: OwnData) -> list[str]:
    """What each sample answers, in order."""
    found = []
    for sample in data.partition.order.tolist():
        ids, is_answer = data.store[sample]
        found.append(data.tokenizer.decode(ids[is_answer], skip_special_tokens=True).strip())
    return found


def test_rows_of_others_are_left_out(own_data: DataMaker) -> None:
    data = own_data(rows_of("bob", "ada", "bob", "ada", "cyd"))
    data.setup("fit")
    assert data.num_samples == 2
    assert texts(data) == ["sun 1", "sun 3"]
    assert data.partition.names == ("ada",)


def test_rows_of_nobody_are_ones_own(own_data: DataMaker) -> None:
    data = own_data(rows_of(None, None, None))
    data.setup("fit")
    assert data.num_samples == 3
    assert data.num_answer_tokens == data.store.answer_counts.sum()


def test_a_file_without_a_row_of_ones_own_is_refused(own_data: DataMaker) -> None:
    with pytest.raises(ValueError, match=r"no row of .*rows.jsonl is of client 'ada', they are of"):
        own_data(rows_of("bob", "cyd")).setup("fit")


def test_a_file_of_which_it_is_unclear_whose_it_is_is_refused(own_data: DataMaker) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 rows of .* are without a `client`, and others"):
        own_data(rows_of("ada", None)).setup("fit")


@pytest.mark.parametrize("client", [0, 3, 200])
def test_its_number_decides_the_draws_and_nothing_else(own_data: DataMaker, client: int) -> None:
    data = own_data(rows_of(*["ada"] * 7))
    data.setup("fit")
    rows = rows_of(*[f"client-{n:03}" for n in range(client)], *["me"] * 7)
    partition = Natural()(SampleColumns(len(rows), [row["client"] for row in rows]), seed=0)
    batches = visit_to(data, client=client, round_=4, num_rounds=5)
    drawn = [sample for batch in batches for sample in batch.key.samples.tolist()]
    assert sorted(drawn) == list(range(7))
    schedule = Schedule(partition, 5, 1, 2, local_epochs=1)
    visit = Visit(4, 0, client, schedule.num_steps(client), failed=False)
    simulated = [s for key in schedule.batches_of(visit) for s in key.samples.tolist()]
    assert [sample + client for sample in drawn] == simulated


def test_samples_held_out_are_not_trained_on(own_data: DataMaker) -> None:
    data = own_data(rows_of(*["ada"] * 8), validation_share=0.25)
    data.setup("fit")
    held = {row for batch in data.val_dataloader() for row in range(len(batch.target_counts))}
    assert len(held) == 2
    assert data.num_samples == 6
    assert not set(data.partition.order.tolist()) & set(data._validation.tolist())


def test_the_filter_judges_on_the_node_and_writes_there(
    own_data: DataMaker, tmp_path: Path
) -> None:
    rule = SafetyFilter(WordGuard("1"))
    data = own_data(rows_of("bob", "ada", "ada", "ada"), filter=rule, folder=tmp_path / "node")
    data.setup("fit")
    lines = [
        json.loads(line) for line in (tmp_path / "node" / "filter.jsonl").read_text().splitlines()
    ]
    assert [(line["client"], line["row"], line["action"]) for line in lines] == [
        ("ada", 2, "dropped"),  # lines of the file
        ("ada", 3, "kept"),
        ("ada", 4, "kept"),
    ]
    assert data.counts()["judged"] == 3
    assert data.counts()["dropped"] == 1
    assert all(isinstance(count, int) for count in data.counts().values())
    assert texts(data) == ["sun 2", "sun 3"]


def test_without_a_filter_there_is_nothing_to_count(own_data: DataMaker, tmp_path: Path) -> None:
    data = own_data(rows_of("ada"), folder=tmp_path / "node")
    data.setup("fit")
    assert data.counts() == {}
    assert not (tmp_path / "node").exists()


def test_rows_that_are_skipped_are_listed_in_the_nodes_folder(
    own_data: DataMaker, tmp_path: Path
) -> None:
    rows = [*rows_of("ada", "ada"), {"prompt": "say it", "client": "ada"}]
    data = own_data(rows, on_bad_row="skip", folder=tmp_path)
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        data.setup("fit")
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["row"] == 3


def test_prompts_of_the_servers_constitution_are_not_needed(own_data: DataMaker) -> None:
    data = own_data(rows_of("ada"), cai=CaiAugmentation(prompts="nowhere.jsonl"))
    data.setup("fit")
    assert data.num_samples == 1


def test_a_tokenizer_of_its_own_is_refused(tiny_gpt2: Path) -> None:
    with pytest.raises(ValueError, match="train_tokenizer is 300, and each node would train"):
        OwnData("ada", train_tokenizer=300)


def test_batches_are_those_of_the_simulation(own_data: DataMaker, tiny_gpt2: Path) -> None:
    data = own_data(rows_of("bob", "ada", "bob", "ada", "ada"))
    data.setup("fit")
    simulated = FederatedDataModule(
        path=data.path,
        partition=Natural(),
        tokenizer=str(tiny_gpt2),
        batch_size=2,
        validation_share=0.0,
    )
    simulated.setup("fit")
    simulated.schedule = Schedule(simulated.partition, 1, 2, 2, local_epochs=1)
    visit = Visit(0, 0, 0, simulated.schedule.num_steps(0), failed=False)
    for own, other in zip(visit_to(data), simulated.client_dataloader(visit), strict=True):
        assert torch.equal(own.input_ids, other.input_ids)
        assert torch.equal(own.targets, other.targets)
        assert own.normalizer == other.normalizer
