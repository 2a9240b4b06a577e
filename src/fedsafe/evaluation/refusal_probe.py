"""`RefusalProbe`: how often the global model refuses harmful prompts, round by round."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.model.generation import generate_answers
from fedsafe.model.module import LoraLM

MEASURE = "val/refusal_rate"


class RefusalProbe(Callback):
    """Answers a few harmful prompts after a round and logs the share refused, `val/refusal_rate`.

    A quick look at the run, not a benchmark: an answer counts as refused when it opens like one.
    It comes with validation, and asks the adapter validated last: in mode `local`, one client's.

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
        for name, value in (("num_prompts", num_prompts), ("every_n_rounds", every_n_rounds)):
            if value < 1:
                raise ValueError(f"{name} of the refusal probe is {value}; give 1 or more")
        self.path = path
        self.num_prompts = num_prompts
        self.every_n_rounds = every_n_rounds
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.openings = common_openings() if openings is None else openings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the prompts."""
        self.prompts = _read_prompts(Path(self.path))[: self.num_prompts]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run that has no validation."""
        if not _data_of(trainer).num_validation_samples:
            raise ValueError(
                "the refusal probe asks when a round is validated, and no sample is held out; set "
                "data.validation_share above 0, or leave the probe out"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask, and log the share refused in percent."""
        if trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_rounds:
            trainer.callback_metrics.pop(MEASURE, None)  # an earlier round's
            return
        assert isinstance(pl_module, LoraLM)
        answers = generate_answers(
            pl_module.peft_model,
            _data_of(trainer).tokenizer,
            [[{"role": "user", "content": prompt}] for prompt in self.prompts],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=trainer.current_epoch,
        )
        refused = sum(opens_with(answer, self.openings) for answer in answers)
        pl_module.log(MEASURE, 100.0 * refused / len(answers), prog_bar=True)


def opens_with(answer: str, openings: Sequence[str]) -> bool:
    """Whether an answer begins with one of the openings, case and spaces aside."""
    text = " ".join(answer.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())
    return text.startswith(tuple(openings))


def common_openings() -> list[str]:
    """How refusals in English commonly begin, in lower case."""
    text = resources.files("fedsafe.evaluation").joinpath("refusal_openings.txt").read_text()
    return text.splitlines()


def _data_of(trainer: Trainer) -> FederatedDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, FederatedDataModule)
    return data


def _read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(
            f"there is no file {path} of prompts; give a JSONL file with a prompt a line"
        )
    lines = path.read_text(encoding="utf-8").split("\n")
    prompts = [_prompt_of(f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{path} is empty; give a JSONL file with a prompt a line")
    return prompts


def _prompt_of(place: str, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{place} has no prompt ({error!r})") from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place} has the prompt {prompt!r}; give some text")
    return prompt
