import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from fedsafe.data.datamodule import GLOBAL_ADAPTER, FederatedDataModule
from fedsafe.data.loaders import EvaluationBatch
from fedsafe.data.packing import TrainingBatch
from fedsafe.federated.partition import IID, Natural
from fedsafe.federated.schedule import Schedule

NUM_ROWS = 30
DataMaker = Callable[..., FederatedDataModule]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "prompt": f"say {i}",
            "response": "word " * (i % 5 + 1),
            "label": ["safe", "unsafe"][i % 2],
        }
        for i in range(NUM_ROWS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def make_data(conversations: Path, tiny_gpt2: Path) -> DataMaker:
    def make(**settings: object) -> FederatedDataModule:
        defaults = {
            "path": str(conversations),
            "partition": IID(4),
            "tokenizer": str(tiny_gpt2),
            "batch_size": 4,
            "validation_share": 0.2,
        }
        data = FederatedDataModule(**(defaults | settings))  # type: ignore[arg-type]
        data.setup("fit")
        data.schedule = Schedule(
            data.partition,
            num_rounds=3,
            clients_per_round=2,
            batch_size=data.batch_size,
            local_epochs=1,
        )
        return data

    return make


def evaluated(batches: list[EvaluationBatch]) -> list[tuple[int, ...]]:
    """The samples in some batches, sorted."""
    return sorted(
        tuple(ids.tolist())
        for batch in batches
        for ids in batch.input_ids[0].split(batch.segment_lengths)
    )


def test_every_sample_is_held_by_one_client_or_by_none_for_validation(
    make_data: DataMaker,
) -> None:
    data = make_data()
    held = [data.partition.samples_of(k).tolist() for k in range(4)]
    validation = data._validation.tolist()
    assert sorted(sum(held, validation)) == list(range(NUM_ROWS))
    assert data.num_validation_samples == len(validation) == 6


def test_the_training_loader_serves_the_plan_of_its_round(make_data: DataMaker) -> None:
    data = make_data()
    assert data.schedule is not None
    for round_ in range(3):
        data.position = (round_, 0)
        batches: list[TrainingBatch] = list(data.train_dataloader())
        keys = list(data.schedule.plan(round_).batches())
        assert [batch.key.samples.tolist() for batch in batches] == [
            key.samples.tolist() for key in keys
        ]
        for batch in batches:
            tokens = np.concatenate([data.store[i][0] for i in batch.key.samples])
            assert np.array_equal(batch.input_ids[0], tokens)
            assert batch.normalizer == len(batch.targets)


def test_the_loader_skips_what_was_done_but_counts_it(make_data: DataMaker) -> None:
    data = make_data()
    everything = [batch.key.samples.tolist() for batch in data.train_dataloader()]
    for done in range(len(everything) + 1):
        data.position = (0, done)
        loader = data.train_dataloader()
        assert len(loader) == len(everything)
        assert [batch.key.samples.tolist() for batch in loader] == everything[done:]


def test_a_client_gets_the_batches_of_its_visit_alone(make_data: DataMaker) -> None:
    data = make_data()
    assert data.schedule is not None
    plan = data.schedule.plan(1)
    for visit in plan.visits:
        own = [batch.key for batch in data.client_dataloader(visit)]
        expected = [key for key in plan.batches() if key.client == visit.client]
        assert [k.samples.tolist() for k in own] == [k.samples.tolist() for k in expected]
        assert own[0].starts_visit
        assert own[-1].ends_visit


def test_worker_processes_serve_the_same_batches(make_data: DataMaker) -> None:
    here, there = (list(make_data(num_workers=n).train_dataloader()) for n in (0, 2))
    assert len(here) == len(there) > 1
    for mine, theirs in zip(here, there, strict=True):
        assert torch.equal(mine.input_ids, theirs.input_ids)
        assert torch.equal(mine.predictors, theirs.predictors)
        assert mine.segment_lengths == theirs.segment_lengths


def test_validation_sees_every_held_out_sample_once(make_data: DataMaker) -> None:
    data = make_data()
    batches = list(data.val_dataloader())
    expected = sorted(tuple(data.store[i][0].tolist()) for i in data._validation)
    assert evaluated(batches) == expected
    assert {batch.client for batch in batches} == {GLOBAL_ADAPTER}


def test_validation_asks_whose_adapters_when_it_begins(make_data: DataMaker) -> None:
    data = make_data()
    data.validated_clients = [GLOBAL_ADAPTER, GLOBAL_ADAPTER]
    loader = data.val_dataloader()
    data.validated_clients[:] = [3, 1]
    batches = list(loader)
    assert len(batches) == len(loader)
    assert [batch.client for batch in batches] == [3, 1]
    assert evaluated(batches[:1]) == evaluated(batches[1:])


def test_no_share_means_no_validation(make_data: DataMaker) -> None:
    data = make_data(validation_share=0.0)
    assert data.val_dataloader() == []
    assert data.num_validation_samples == 0


def test_test_conversations_come_from_their_own_file(make_data: DataMaker, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text('{"prompt": "say a", "response": "b"}\n')
    data = make_data(test_path=str(file))
    [[batch]] = data.test_dataloader()
    assert data.tokenizer.decode(batch.targets) == " b</s>"
    assert batch.client == GLOBAL_ADAPTER


def test_without_test_conversations_there_is_no_test(make_data: DataMaker) -> None:
    with pytest.raises(ValueError, match=r"there is nothing to test on; give data.benchmarks"):
        make_data().test_dataloader()


def test_a_round_in_which_everyone_fails_is_an_error(make_data: DataMaker) -> None:
    data = make_data()
    data.schedule = Schedule(
        data.partition,
        num_rounds=3,
        clients_per_round=2,
        batch_size=4,
        local_epochs=1,
        failure_probability=1.0,
    )
    data.position = (1, 0)
    with pytest.raises(ValueError, match=r"every client of round 2 fails \(client-\d, client-\d\)"):
        data.train_dataloader()
    data.position = (3, 0)
    assert len(data.train_dataloader()) == 0, "the run is over"


def test_a_loader_needs_a_schedule(make_data: DataMaker) -> None:
    data = make_data()
    data.schedule = None
    with pytest.raises(ValueError, match="no schedule of visits; add FederatedRounds to the Train"):
        data.train_dataloader()


def test_two_tokenizers_are_one_too_many(conversations: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer or train_tokenizer, not both; got 'a' and 300"):
        FederatedDataModule(str(conversations), tokenizer="a", train_tokenizer=300)


def test_data_without_a_tokenizer_and_a_model_is_an_error(conversations: Path) -> None:
    with pytest.raises(ValueError, match="no model to take the tokenizer from; give tokenizer or"):
        FederatedDataModule(str(conversations)).setup("fit")


def test_a_tokenizer_can_be_trained_on_the_conversations(conversations: Path) -> None:
    data = FederatedDataModule(str(conversations), partition=IID(2), train_tokenizer=290)
    data.setup("fit")
    assert len(data.tokenizer) <= 290
    assert data.tokenizer.decode(data.store[0][0]).count("say 0") == 1


def test_the_table_of_clients_counts_what_they_hold(make_data: DataMaker) -> None:
    data = make_data()
    rows = data.client_rows()
    assert sum(row.samples for row in rows) == NUM_ROWS - 6
    for client, row in enumerate(rows):
        held = [len(data.store[i][0]) for i in data.partition.samples_of(client)]
        assert (row.samples, row.tokens) == (len(held), sum(held))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"partition": IID(3)}, "data.partition"),
        ({"seed": 1}, "data.seed"),
        ({"batch_size": 5}, "data.batch_size"),
        ({"max_length": 511}, "data.max_length"),
        ({"validation_share": 0.3}, "data.validation_share"),
    ],
)
def test_identity_tells_runs_apart(
    make_data: DataMaker, settings: dict[str, object], name: str
) -> None:
    one, other = make_data().identity(), make_data(**settings).identity()
    assert one == make_data().identity()
    assert one[name] != other[name]


def test_identity_notices_other_samples_of_the_same_length(
    make_data: DataMaker, conversations: Path, tmp_path: Path
) -> None:
    copy, changed = tmp_path / "copy.jsonl", tmp_path / "changed.jsonl"
    copy.write_text(conversations.read_text())
    changed.write_text(conversations.read_text().replace("say 7", "say 9"))
    here = make_data().identity()
    assert make_data(path=str(copy)).identity() == here
    there = make_data(path=str(changed)).identity()
    assert {name for name in here if here[name] != there[name]} == {"data.samples"}
    assert len(here["data.samples"]) == 12
    assert here["data.partition"].startswith("IID ")


def test_clients_that_validation_takes_whole_are_named(
    make_data: DataMaker, tmp_path: Path
) -> None:
    file = tmp_path / "clients.jsonl"
    rows = [
        {"prompt": "say", "response": "a", "client": f"c{min(i, NUM_ROWS - i)}"}
        for i in range(NUM_ROWS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match=r"clients take no part, .*: c\d.*; lower validation_sh"):
        data = make_data(path=str(file), partition=Natural(), validation_share=0.6)
    named = {row["client"] for row in rows} - set(data.partition.names)
    assert named


def trainer_of(folder: Path, **hparams: object) -> SimpleNamespace:
    """As much of a Trainer as the data asks for."""
    module = SimpleNamespace(hparams=hparams)
    return SimpleNamespace(
        is_global_zero=True,
        default_root_dir=str(folder),
        lightning_module=module,
        strategy=SingleDeviceStrategy(),
    )


def test_a_new_vocabulary_is_refused_for_a_trained_base(
    conversations: Path, tmp_path: Path
) -> None:
    data = FederatedDataModule(str(conversations), partition=IID(2), train_tokenizer=290)
    data.trainer = trainer_of(tmp_path, base="some/model", from_config=None)
    with pytest.raises(ValueError, match="is 290; it makes a new vocabulary, which a trained base"):
        data.setup("fit")
    data.trainer = trainer_of(tmp_path, base="gpt2", from_config={"n_embd": 8})
    data.setup("fit")


def test_bad_rows_of_the_test_conversations_are_listed_too(
    conversations: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for file in (train, test):
        file.write_text(conversations.read_text() + '{"prompt": "no answer"}\n')
    settings: Any = {
        "partition": IID(2),
        "tokenizer": str(tiny_gpt2),
        "test_path": str(test),
        "on_bad_row": "skip",
    }
    data = FederatedDataModule(str(train), **settings)
    data.trainer = trainer_of(tmp_path)
    data.setup("fit")
    for _ in range(2):  # the second test's rows are not added to the first's
        tested = FederatedDataModule("nowhere.jsonl", **settings)
        tested.trainer = trainer_of(tmp_path)
        tested.setup("test")
        tested.test_dataloader()
    for name, source in (("rejected.jsonl", train), ("rejected-test.jsonl", test)):
        lines = (tmp_path / name).read_text().splitlines()
        assert [Path(json.loads(line)["source"]).name for line in lines] == [source.name]


def test_the_training_set_travels_to_a_worker_without_its_tokens(make_data: DataMaker) -> None:
    data = make_data()
    dataset = data.train_dataloader().dataset
    assert len(pickle.dumps(dataset)) < 20_000
