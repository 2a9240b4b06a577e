"""`RefusalProbe`: how often the global model refuses harmful prompts, round by round."""

from lightning import Callback, LightningModule, Trainer

from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.data.prompts import load_prompts
from fedsafe.model.generation import generate_answers
from fedsafe.model.module import LoraLM
from fedsafe.safety.refusal_openings import common_openings, opens_with

MEASURE = "val/refusal_rate"


class RefusalProbe(Callback):
    """Answers a few harmful prompts after a round and logs the share refused, `val/refusal_rate`.

    A quick look at the run, not a benchmark: an answer counts as refused when it opens like one.
    It comes with validation, and asks the adapter validated last: in mode `local`, one client's.

    Args:
        path: Prompts, as for `data.prompts.load_prompts`: a JSONL file with a `prompt` a line.
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
        self.prompts = [each.messages for each in load_prompts(self.path)[: self.num_prompts]]

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
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=trainer.current_epoch,
        )
        refused = sum(opens_with(answer, self.openings) for answer in answers)
        pl_module.log(MEASURE, 100.0 * refused / len(answers), prog_bar=True)


def _data_of(trainer: Trainer) -> FederatedDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, FederatedDataModule)
    return data
