"""What every benchmark is: items that a model is asked, and a score of each of its replies."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedsafe.data.packing import Pack
from fedsafe.model.generation import Model
from fedsafe.peers import ALONE, Peers
from fedsafe.types import Conversation

Item = TypeVar("Item")


@dataclass(frozen=True)
class Respondent:
    """A model as benchmarks see it.

    Attributes:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer, with a chat template.
        answer_logprobs: Log-probability of each answer of a pack, summed over its tokens, nats,
            shape ``(num_samples,)``.
        replica: The ranks that hold the model together. They all ask the same items; what another
            model does, such as a guard or a judge, the first of them has done for all.
    """

    model: Model
    tokenizer: PreTrainedTokenizerBase
    answer_logprobs: Callable[[Pack], Tensor]
    replica: Peers = ALONE


@dataclass(frozen=True)
class Record:
    """One item, asked and scored; a line of `replies/<benchmark>.jsonl`.

    Attributes:
        id: The same in every run, so that two runs can be compared item by item.
        scores: A number for each measure that this item counts for: percent (0 or 100 where there
            is only right and wrong) or, of a judge, its rating; None where it could not be found,
            for a reason that `problem` tells.
        category: Kind of item; None where the benchmark has none.
        conversation: What was asked and replied.
        details: What else a reader may want to know, such as the words of a judge.
        problem: Why a score is missing, in a few words that are the same for all such items.
    """

    id: str
    scores: Mapping[str, float | None]
    category: str | None = None
    conversation: Conversation = field(default_factory=list)
    details: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


class Benchmark(ABC):
    """Items that a model is asked, and the scores of its replies.

    Attributes:
        name: Lower case, of its files and its measures, such as `advbench`.
        measures: What is measured, such as `refusal_rate`; a score of each record has such a name.
        batch_size: Items asked at a time.
    """

    name: str
    measures: tuple[str, ...]
    batch_size: int

    @abstractmethod
    def load(self) -> None:
        """Read and check the items; a second call does nothing.

        Raises:
            ValueError: If the file is missing, has other columns, or holds no item.
        """

    @property
    @abstractmethod
    def categories(self) -> Sequence[str | None]:
        """The category of each item, in order; as many as there are items."""

    @abstractmethod
    def ask(self, respondent: Respondent, places: Sequence[int]) -> list[Record]:
        """Ask some items and score the replies.

        Args:
            respondent: Whom to ask.
            places: Which items, from 0.

        Returns:
            One record an item, in order.
        """

    def release(self) -> None:  # noqa: B027
        """Free the memory of models that asking loaded; the next item loads them again."""

    @property
    def num_items(self) -> int:
        """How many items there are."""
        return len(self.categories)


def evenly_spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """As many items as the limit allows, from all over the sequence; None is no limit."""
    count = min(limit or len(items), len(items))
    return [items[number * len(items) // count] for number in range(count)]


def check_counts(name: str, **counts: int | None) -> None:
    """Refuse settings of a benchmark that count something and are below 1.

    Raises:
        ValueError: If there is one; None is no count.
    """
    for setting, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{setting} of {name} is {value}; give 1 or more")
