import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
)

from fedsafe.safety.classifier_scorer import (
    ClassifierScorer,
    class_ids,
    load_classifier,
    num_positions,
)
from fedsafe.safety.guard_format import Question

VOCABULARY = 64
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
}
CONFIGS = {"bert": BertConfig, "roberta": RobertaConfig, "llama": LlamaConfig}
CPU = torch.device("cpu")
SAFE_OR_NOT = Question({"safe": 0.0, "unsafe": 1.0})


def classifier(kind: str = "bert", classes: str = "safe unsafe", **config: Any) -> PreTrainedModel:
    names = dict(enumerate(classes.split()))
    settings = CONFIGS[kind](**SMALL | {"pad_token_id": 1, "id2label": names} | config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(settings)
        for parameter in model.parameters():  # as they come, all prompts get the same answer
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def prompts(count: int = 7) -> list[list[int]]:
    """Of lengths 3 to 41, not sorted, without the token of the padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + (n * 17) % 39 for n in range(count)]
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def plain_probabilities(model: PreTrainedModel, asked: list[list[int]]) -> torch.Tensor:
    """One prompt at a time, as the documentation of transformers does it."""
    rows = []
    for ids in asked:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        if model.config.problem_type == "multi_label_classification":
            rows.append(torch.sigmoid(logits))
        elif len(logits) == 1:
            rows.append(torch.stack([torch.sigmoid(logits[0]), 1 - torch.sigmoid(logits[0])]))
        else:
            rows.append(torch.softmax(logits, -1))
    return torch.stack(rows)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("classes", ["safe unsafe", "safe unsure unsafe", "toxic"])
def test_probabilities_are_those_of_plain_transformers_alone_and_in_batches(
    kind: str, classes: str
) -> None:
    model, asked = classifier(kind, classes), prompts()
    expected = plain_probabilities(model, asked)
    numbers = list(range(expected.shape[1]))
    assert expected.std(0).min() > 1e-3  # the prompts differ
    for max_tokens in (1, 60, 10_000):
        scorer = ClassifierScorer(model, max_tokens=max_tokens)
        found = scorer.label_probabilities(asked, numbers)
        assert found.dtype == torch.float32
        assert scorer.exclusive
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    alone = [scorer.label_probabilities([ids], numbers) for ids in asked]
    torch.testing.assert_close(torch.cat(alone), expected, rtol=0, atol=1e-6)


@pytest.mark.oracle
def test_classes_of_a_multi_label_classifier_are_apart() -> None:
    model = classifier(classes="insult threat slur", problem_type="multi_label_classification")
    scorer = ClassifierScorer(model, max_tokens=64)
    found = scorer.label_probabilities(prompts(), [0, 1, 2])
    assert not scorer.exclusive
    assert (found.sum(1) > 1.01).any()
    torch.testing.assert_close(found, plain_probabilities(model, prompts()), rtol=0, atol=1e-6)


def test_only_the_classes_asked_for_are_given_and_in_their_order() -> None:
    scorer = ClassifierScorer(classifier(classes="a b c"), max_tokens=64)
    every = scorer.label_probabilities(prompts(), [0, 1, 2])
    assert torch.equal(scorer.label_probabilities(prompts(), [2, 0]), every[:, [2, 0]])


def test_batches_stay_within_the_budget_with_like_lengths_together() -> None:
    model, shapes = classifier(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    asked = [[5] * 10] * 4 + [[5] * 3] * 9 + [[5] * 30]
    ClassifierScorer(model, max_tokens=24).label_probabilities(asked, [0])
    assert shapes == [(1, 30), (2, 10), (2, 10), (8, 3), (1, 3)]


def test_a_model_without_a_padding_token_is_asked_one_prompt_at_a_time() -> None:
    model = classifier("llama", pad_token_id=None)
    found = ClassifierScorer(model, max_tokens=1000).label_probabilities(prompts(), [0, 1])
    torch.testing.assert_close(found, plain_probabilities(model, prompts()), rtol=0, atol=1e-6)


def test_probabilities_of_half_precision_weights_are_float32_and_sum_to_one() -> None:
    scorer = ClassifierScorer(classifier().to(torch.bfloat16), max_tokens=64)
    found = scorer.label_probabilities(prompts(), [0, 1])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(7))


def test_nan_weights_give_nan() -> None:
    model = classifier()
    model.classifier.weight.data[0, 0] = torch.nan
    found = ClassifierScorer(model, max_tokens=64).label_probabilities(prompts(), [0, 1])
    assert found.isnan().all()


def test_a_classifier_writes_nothing() -> None:
    with pytest.raises(ValueError, match="writes no answer; leave `categories` out of its format"):
        ClassifierScorer(classifier(), max_tokens=64).answers(prompts(), max_new_tokens=4)


def test_a_regression_is_refused() -> None:
    model = classifier(classes="score", problem_type="regression")
    with pytest.raises(ValueError, match="has problem_type regression: it gives a number"):
        ClassifierScorer(model, max_tokens=64)


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        pytest.param("unsafe safe", "safe unsafe", {"safe": 1, "unsafe": 0}, id="own-order"),
        pytest.param("ok meh bad", "ok bad", {"ok": 0, "bad": 2}, id="some-of-them"),
        pytest.param("LABEL_0 LABEL_1", "LABEL_0 LABEL_1", {"LABEL_0": 0, "LABEL_1": 1}, id="bare"),
        pytest.param("toxic", "other toxic", {"other": 1, "toxic": 0}, id="one-output"),
    ],
)
def test_labels_are_found_among_the_names_of_the_classes(
    classes: str, labels: str, expected: dict[str, int]
) -> None:
    question = Question(dict.fromkeys(labels.split(), 1.0))
    assert class_ids(question, classifier(classes=classes).config) == expected


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("safe hate", "has no class 'unsafe'; its classes are 'safe', 'hate': name them as"),
        ("Safe Unsafe", "has no class 'safe', 'unsafe'; its classes are 'Safe', 'Unsafe'"),
        ("toxic", "'unsafe'; its classes are 'toxic': .* with one more label for all else"),
    ],
    ids=["other-name", "other-case", "one-output"],
)
def test_a_label_without_a_class_is_refused(classes: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_ids(SAFE_OR_NOT, classifier(classes=classes).config)


@pytest.fixture
def saved(tmp_path: Path, tiny_llama: Path) -> Callable[[PreTrainedModel], Path]:
    """Write a model beside a tokenizer."""

    def save(model: PreTrainedModel) -> Path:
        model.save_pretrained(tmp_path)
        for file in tiny_llama.glob("tokenizer*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return save


def test_a_saved_classifier_is_loaded_ready_to_judge(
    saved: Callable[[PreTrainedModel], Path],
) -> None:
    model = classifier(hidden_dropout_prob=0.5)
    loaded, tokenizer = load_classifier(str(saved(model)), dtype=torch.float32, device=CPU)
    found = ClassifierScorer(loaded, max_tokens=64).label_probabilities(prompts(), [0, 1])
    torch.testing.assert_close(found, plain_probabilities(model, prompts()), rtol=0, atol=1e-6)
    assert tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert load_classifier(str(saved(model)), dtype=torch.bfloat16, device=CPU)[0].dtype == (
        torch.bfloat16
    )


def test_a_language_model_is_no_classifier(saved: Callable[[PreTrainedModel], Path]) -> None:
    folder = saved(BertForMaskedLM(BertConfig(**SMALL)))
    with pytest.raises(ValueError, match=r"has no trained .*; it is no sequence classifier: take"):
        load_classifier(str(folder), dtype=torch.float32, device=CPU)


def test_weights_for_another_number_of_classes_are_refused(
    saved: Callable[[PreTrainedModel], Path],
) -> None:
    folder = saved(classifier())
    config = json.loads((folder / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "a", "1": "b", "2": "c"}, {}
    (folder / "config.json").write_text(json.dumps(config))
    message = r"classifier.bias of shape \(2,\), and its configuration, with 3 classes, makes it"
    with pytest.raises(ValueError, match=message):
        load_classifier(str(folder), dtype=torch.float32, device=CPU)


def test_a_missing_classifier_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no classifier at .*; give the name of a sequence class"):
        load_classifier(str(tmp_path / "nowhere"), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(("kind", "readable"), [("bert", 48), ("roberta", 46), ("llama", 48)])
def test_as_many_tokens_can_be_read_as_is_said(kind: str, readable: int) -> None:
    model = classifier(kind)
    assert num_positions(model) == readable
    asked = [[5] * readable, [7] * 3]
    found = ClassifierScorer(model, max_tokens=1000).label_probabilities(asked, [0, 1])
    assert found.isfinite().all()
