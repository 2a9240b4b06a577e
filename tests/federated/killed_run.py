"""A run that saves at every step and may kill itself at one: what test_resume starts."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fedsafe.data.augmentation import CaiAugmentation
from fedsafe.data.datamodule import FederatedDataModule
from fedsafe.federated.checkpoint import RoundCheckpoint, last_checkpoint
from fedsafe.federated.client_drift import Scaffold
from fedsafe.federated.constitutional_training import ConstitutionalTraining
from fedsafe.federated.partition import Natural
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.server_listener import ServerVisitListener
from fedsafe.federated.server_optimizer import FedAdam
from fedsafe.model.module import LoraLM
from fedsafe.safety import score_cache
from fedsafe.safety.filter import SafetyFilter
from fedsafe.safety.revision import Reviser
from fedsafe.types import Conversation, Verdict

sys.path.append(str(Path(__file__).parents[1] / "stand_ins"))
from word_guard import WordGuard  # found once its folder is known

score_cache.CHUNK_SIZE = 5


class SigKill(Callback):
    """Kills the process in the backward pass after `step` steps, or at the end of the round."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class ServerKill(Callback, ServerVisitListener):
    """Kills the process in the backward pass that follows the server's step `step` of a visit."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.done = 0

    def on_server_step(self, trainer: Trainer, num_done: int) -> None:
        self.done = num_done

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        if self.done >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Killing(WordGuard):
    """Kills the process when it is asked for its chunk number `chunk`, from 1.

    Its probabilities depend a little on what is judged together.
    """

    def __init__(self, word: str, chunk: int | None) -> None:
        super().__init__(word)
        self.chunk = chunk

    def judge(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        noise = sum(len(each[0]["content"]) for each in conversations) * 1e-5
        verdicts = [v._replace(unsafe=v.unsafe + noise) for v in super().judge(conversations)]
        if len(self.seen) == self.chunk:
            os.kill(os.getpid(), signal.SIGKILL)
        return verdicts


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("base", "conversations", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--filter")
    parser.add_argument("--kill-scan", type=int)
    parser.add_argument("--server", type=Path)
    parser.add_argument("--kill-server", type=int)
    options = parser.parse_args()
    guard = Killing(options.filter, options.kill_scan)
    safety = SafetyFilter(guard, "refuse", max_unsafe_share=1.0) if options.filter else None
    saving = ModelCheckpoint(
        options.folder, filename="last", every_n_train_steps=1, enable_version_counter=False
    )
    rounds = FederatedRounds(
        local_steps=3,
        client_drift=Scaffold(),
        server_optimizer=FedAdam(0.1),
        cai=ConstitutionalTraining(iterations=20, max_passes=2) if options.server else None,
    )
    killers: list[Callback] = [SigKill(options.kill_at)] if options.kill_at else []
    if options.server:
        killers += [RoundCheckpoint(every_n_steps=1), ServerKill(options.kill_server or 1_000_000)]
    trainer = Trainer(
        default_root_dir=options.folder,
        max_epochs=2,
        accelerator="cpu",
        callbacks=[rounds, saving, *killers],
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        LoraLM(str(options.base), rank=4, lora_dropout=0.2, learning_rate=1e-2),
        datamodule=FederatedDataModule(
            str(options.conversations),
            Natural(),
            safety,
            constitutional_data(options.server) if options.server else None,
            batch_size=3,
            validation_share=0.0,
        ),
        ckpt_path=_newest(options) if options.resume else None,
    )


def constitutional_data(folder: Path) -> CaiAugmentation:
    """The files of a folder; the model is random, so that few of its pairs are kept."""
    reviser = Reviser(str(folder / "constitution.yaml"), max_new_tokens=48, critic_temperature=1.0)
    return CaiAugmentation(
        prompts=str(folder / "prompts.jsonl"),
        reviser=reviser,
        helpful=str(folder / "helpful.jsonl"),
        batch_size=4,
    )


def _newest(options: argparse.Namespace) -> Path:
    if options.server:
        return last_checkpoint(options.folder)
    return Path(options.folder / "last.ckpt")


if __name__ == "__main__":
    main()
