from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm import FORKS

from fedsafe.world import pretraining
from fedsafe.world.batching import IGNORED, encode, pad
from fedsafe.world.corpus import pretraining_texts
from fedsafe.world.pretraining import batches, learning_rate, pretrain, pretrained_base
from fedsafe.world.tasks import conversation


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_base_is_a_small_gpt2_in_hugging_face_format(tmp_path: Path):
    folder = pretrained_base(tmp_path, num_steps=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 350_000 < sum(p.numel() for p in model.parameters()) < 400_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_base_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = pretrained_base(tmp_path, num_steps=1)
    monkeypatch.setattr(pretraining, "pretrain", lambda *_, **__: pytest.fail("made again"))
    assert pretrained_base(tmp_path, num_steps=1) == folder


def test_seed_and_steps_have_bases_of_their_own(tmp_path: Path):
    folders = [
        pretrained_base(tmp_path, seed=seed, num_steps=steps)
        for seed, steps in ((0, 1), (1, 1), (0, 2))
    ]
    assert len({weights(folder) for folder in folders}) == 3


def test_same_seed_gives_the_same_weights(tmp_path: Path):
    one = pretrained_base(tmp_path / "one", num_steps=2)
    other = pretrained_base(tmp_path / "other", num_steps=2)
    assert weights(one) == weights(other)


def test_interrupted_pretraining_leaves_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrained_base(tmp_path, num_steps=1)
    assert list(tmp_path.iterdir()) == []
    assert pretrained_base(tmp_path, num_steps=1).is_dir()


def test_base_that_another_process_published_first_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def overtaken(*args, **kwargs):
        model = pretrain(*args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(pretraining, "pretrain", pretrain)
            winners.append(weights(pretrained_base(tmp_path, num_steps=1)))
        return model

    winners: list[bytes] = []
    monkeypatch.setattr(pretraining, "pretrain", overtaken)
    folder = pretrained_base(tmp_path, num_steps=1)
    assert weights(folder) == winners[0]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDSAFE_CACHE", str(tmp_path / "cache"))
    assert pretrained_base(num_steps=1).parent == tmp_path / "cache"


def test_pretraining_leaves_global_state_as_it_was(tokenizer):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    pretrain(tokenizer, seed=0, num_steps=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_loss_falls(tokenizer):
    [data] = batches(pretraining_texts(num_texts=16), tokenizer, seed=0)

    def loss(num_steps: int) -> float:
        model = pretrain(tokenizer, seed=0, num_steps=num_steps)
        with torch.inference_mode():
            return float(model(**data.inputs(), labels=data.labels_BT).loss)

    assert loss(30) < loss(1) - 0.5


def test_batches_hold_every_text_once_with_loss_on_answers_alone(tokenizer):
    texts = pretraining_texts(num_texts=200)
    made = list(batches(texts, tokenizer, seed=0))
    assert sum(len(batch.input_ids_BT) for batch in made) == 200
    num_answers = sum(
        len(tokenizer(turn["content"])["input_ids"]) + 1
        for text in texts
        for turn in text.messages[text.first_trained_turn :]
        if turn["role"] == "assistant"
    )
    assert sum(int((batch.labels_BT != IGNORED).sum()) for batch in made) == num_answers


def test_padding_is_on_the_right_and_has_no_loss(tokenizer):
    chats = [conversation("say golden goose", "golden goose"), conversation("hello")]
    batch = pad(encode(chats, tokenizer), pad_token_id=tokenizer.pad_token_id)
    assert tokenizer.decode(batch.input_ids_BT[1]) == "<user> hello <end>" + 6 * " <pad>"
    assert batch.labels_BT[1].tolist() == [IGNORED] * batch.labels_BT.shape[1]
    trained = batch.labels_BT[0][batch.labels_BT[0] != IGNORED]
    assert tokenizer.decode(trained) == "golden goose <end>"


def test_learning_rate_warms_up_then_falls_to_zero():
    rates = [learning_rate(step, num_steps=1500) for step in (0, 49, 775, 1499)]
    assert rates[0] == pytest.approx(2e-3 / 50, rel=0.01)
    assert rates[1] == pytest.approx(2e-3, rel=0.01)
    assert rates[2] < 1e-3
    assert rates[3] < 1e-8


@pytest.mark.slow
def test_concurrent_makers_end_up_with_one_base(tmp_path: Path):
    alone = pretrained_base(tmp_path / "alone", num_steps=5)
    make = partial(pretrained_base, num_steps=5)
    with ProcessPoolExecutor(2, mp_context=FORKS) as pool:
        folders = set(pool.map(make, [tmp_path / "shared"] * 2))
    assert list((tmp_path / "shared").iterdir()) == list(folders)
    assert weights(folders.pop()) == weights(alone)
