"""`RefusalProbe`: how often the global model refuses harmful prompts, round by round."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.model.generation import generate_answers
from fedsafe.model.module import LoraLM


class RefusalProbe(Callback):
    """Answers a few harmful prompts after a round and logs the share refused, `val/refusal_rate`.

    A quick look at the run, not a benchmark: an answer counts as refused when it opens like one.

    Args:
        path: JSONL file with a `prompt` a line.
        num_prompts: Prompts asked, from the start of the file.
        every_n_rounds: Rounds between two looks.
        temperature: 0 for the likeliest answers; 1 to sample, which shows harm earlier fade in.
        max_new_tokens: Tokens generated for each answer; a refusal shows early.
        openings: How a refusal begins, in lower case; None takes a list of common English ones.
    """

    def __init__(
        self,
        path: str,
        num_prompts: int = 48,
        every_n_rounds: int = 1,
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        openings: list[str] | None = None,
    ) -> None:
        self.path = path
        self.num_prompts = num_prompts
        self.every_n_rounds = every_n_rounds
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.openings = common_openings() if openings is None else openings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the prompts."""
        self.prompts = _read_prompts(Path(self.path))[: self.num_prompts]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask, and log the share refused in percent."""
        if trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_rounds:
            return
        assert isinstance(pl_module, LoraLM)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, FederatedDataModule)
        answers = generate_answers(
            pl_module.peft_model,
            data.tokenizer,
            [[{"role": "user", "content": prompt}] for prompt in self.prompts],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=trainer.current_epoch,
        )
        refused = sum(opens_with(answer, self.openings) for answer in answers)
        pl_module.log("val/refusal_rate", 100.0 * refused / len(answers), prog_bar=True)


def opens_with(answer: str, openings: Sequence[str]) -> bool:
    """Whether an answer begins with one of the openings, case and spaces aside."""
    text = " ".join(answer.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())
    return text.startswith(tuple(openings))


def common_openings() -> list[str]:
    """How refusals in English commonly begin, in lower case."""
    text = resources.files("fedsafe.evaluation").joinpath("refusal_openings.txt").read_text()
    return text.splitlines()


def _read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(
            f"there is no file {path} of prompts; give a JSONL file with a prompt a line"
        )
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} has no prompt ({error!r})") from error
    if not prompts:
        raise ValueError(f"{path} is empty; give a JSONL file with a prompt a line")
    return prompts
