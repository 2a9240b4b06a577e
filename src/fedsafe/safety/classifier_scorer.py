"""Sequence classifiers as guards: one forward pass gives the probability of each class.

Shapes: B prompts of a batch, T tokens of the longest, C classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedsafe.data.packing import split_by_budget
from fedsafe.data.tokenizer import load_tokenizer
from fedsafe.safety.guard_format import Question
from fedsafe.safety.scorer import Scorer


class ClassifierScorer(Scorer):
    """Probabilities of a classifier's classes.

    They are a softmax over the classes, or with `problem_type: multi_label_classification` in the
    model's configuration a sigmoid of each: then a text can be of several classes or of none, and
    `exclusive` is false. One output alone is the probability of the class it is named after, and
    class 1 is all else.

    Args:
        model: A sequence classifier in evaluation mode.
        max_tokens: Tokens of a batch with its padding; a longer prompt is a batch of its own.

    Raises:
        ValueError: If the model gives a number on a scale of its own instead of probabilities.
    """

    def __init__(self, model: PreTrainedModel, *, max_tokens: int) -> None:
        config = model.config
        if config.problem_type == "regression":
            raise ValueError(
                f"the classifier {config.name_or_path!r} has problem_type regression: it gives a "
                "number, which is no probability; take one that was trained to tell classes"
            )
        self._model = model
        self._max_tokens = max_tokens
        self._is_multi_label = config.problem_type == "multi_label_classification"
        self.exclusive = not self._is_multi_label or config.num_labels == 1

    @torch.no_grad()
    def label_probabilities(
        self, prompts: Sequence[Sequence[int]], label_ids: Sequence[int]
    ) -> Tensor:
        """See `Scorer`."""
        probabilities = torch.empty(len(prompts), len(label_ids))
        for group in self._groups(prompts):
            ids_BT, mask_BT = self._pad([prompts[row] for row in group])  # noqa: N806
            device = self._model.device
            output = self._model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device))
            classes_BC = self._probabilities(output.logits.float())  # noqa: N806
            probabilities[group] = classes_BC[:, list(label_ids)].cpu()
        return probabilities

    def answers(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """Refused: a classifier writes nothing."""
        raise ValueError(
            f"the classifier {self._model.config.name_or_path!r} writes no answer; leave "
            "`categories` out of its format, or take a guard that is a language model"
        )

    @property
    def _padding(self) -> int | None:
        """The model's own, not the tokenizer's: by it some models find a prompt's end."""
        padding: int | None = self._model.config.get_text_config().pad_token_id
        return padding

    def _groups(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Rows of prompts, longest first, in groups that fit the budget once they are padded."""
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
        budget = self._max_tokens if self._padding is not None else 0  # 0: one at a time
        yield from split_by_budget(lengths, max_tokens=budget, padded=True)

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids padded on the right, and 1 where they are; shape ``(B, T)``."""
        shape = len(prompts), max(len(prompt) for prompt in prompts)
        ids_BT = torch.full(shape, self._padding or 0)  # noqa: N806
        mask_BT = torch.zeros(shape, dtype=torch.long)  # noqa: N806
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = torch.tensor(prompt)
            mask_BT[row, : len(prompt)] = 1
        return ids_BT, mask_BT

    def _probabilities(self, logits_BC: Tensor) -> Tensor:  # noqa: N803
        if logits_BC.shape[1] == 1:
            return torch.cat([logits_BC, -logits_BC], 1).sigmoid()
        return logits_BC.sigmoid() if self._is_multi_label else logits_BC.softmax(1)


def class_ids(question: Question, config: PreTrainedConfig) -> dict[str, int]:
    """The number of the class that each label of a question names.

    Args:
        question: Its labels are names of classes. For a classifier with one output they are that
            class and a name for all else.
        config: The classifier's configuration, whose `id2label` names its classes.

    Raises:
        ValueError: If a label names no class.
    """
    assert config.id2label is not None
    numbers = {str(name): int(number) for number, name in config.id2label.items()}
    missing = [label for label in question.labels if label not in numbers]
    if len(numbers) == 1 and len(question.labels) == 2 and len(missing) == 1:
        numbers[missing[0]] = 1
    elif missing:
        raise ValueError(
            f"the classifier {config.name_or_path!r} has no class {', '.join(map(repr, missing))}; "
            f"its classes are {', '.join(map(repr, numbers))}: name them as `labels` of the format"
            + (", with one more label for all else" if len(numbers) == 1 else "")
        )
    return {label: numbers[label] for label in question.labels}


def load_classifier(
    name: str, *, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier and its tokenizer; code that comes with it is never run.

    Args:
        name: Hub name or folder.
        dtype: Type of the weights.
        device: Where to put them.

    Raises:
        ValueError: If there is none of that name, it has no trained classes, or it has another
            number of them than its configuration says.
    """
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no classifier at {name!r}: {str(error).strip().splitlines()[0]}; give the name of a "
            "sequence classifier on the hub, or a folder that holds config.json and *.safetensors"
        ) from error
    if report["mismatched_keys"]:
        key, saved, expected = min(report["mismatched_keys"])
        raise ValueError(
            f"the classifier {name!r} has {key} of shape {tuple(saved)}, and its configuration, "
            f"with {model.config.num_labels} classes, makes it {tuple(expected)}; mend id2label in "
            "its config.json"
        )
    if report["missing_keys"]:
        raise ValueError(
            f"{name!r} has no trained {min(report['missing_keys'])}, which "
            f"{type(model).__name__} needs; it is no sequence classifier: take one, or set "
            "loader: causal in the format if it is a language model"
        )
    return model.eval().requires_grad_(False).to(device), load_tokenizer(name)


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a classifier can read; None where it has no limit.

    RoBERTa and its kin count positions from behind that of the padding, so that some of those in
    the configuration are no token's.
    """
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    return positions
