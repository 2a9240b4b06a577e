"""`ClientTrainer`: a node's whole part in a federation, one letter in and one letter out.

Knows no engine, and remembers nothing from letter to letter but its base and its data: a node that
was killed and started again answers as before.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast, get_args

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from fedsafe.data.packing import TrainingBatch
from fedsafe.federated.client_drift import ClientDrift, Correction
from fedsafe.federated.local_training import train_client
from fedsafe.federated.remote.facts import (
    HELLO,
    VISIT,
    Encoding,
    Failure,
    Greeting,
    NodeFacts,
    VisitOrder,
    VisitReport,
)
from fedsafe.federated.remote.held_out import HeldOutLoss
from fedsafe.federated.remote.letter import Letter
from fedsafe.federated.remote.own_data import OwnData
from fedsafe.federated.remote.shared_settings import library_versions, shared_settings
from fedsafe.federated.remote.tensors import pack_update, unpack_adapter
from fedsafe.federated.rounds import FederatedRounds
from fedsafe.federated.trainer_settings import check_precision_for_drift
from fedsafe.model.module import LoraLM
from fedsafe.strategies.layout import LaidOut, layout_of
from fedsafe.strategies.sharded import ShardedStrategy

log = logging.getLogger(__name__)

_MOST_CLIENTS = 10_000_000
_QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class ClientTrainer:
    """Answers the server's letters; reads its data and loads its base when it is made.

    Args:
        module: The model.
        data: The client's own conversations.
        rounds: The rules of a visit: its steps or epochs, the drift and the seed. Who takes part
            and how updates are averaged is the server's.
        trainer_settings: Settings of the Lightning Trainer: accelerator, devices, strategy,
            precision, clipping, accumulation.

    Raises:
        ValueError: If the data cannot be read, or the model cannot read them, or the strategy is
            one that a node cannot train under.
    """

    def __init__(
        self,
        module: LoraLM,
        data: OwnData,
        rounds: FederatedRounds,
        *,
        trainer_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._module = module
        self._data = data
        self._rounds = rounds
        self._is_training = False
        self._trainer_settings = {**_QUIET, **(trainer_settings or {})}
        trainer = self._make_trainer()
        self._num_micro = trainer.accumulate_grad_batches
        if rounds.client_drift is not None:
            check_precision_for_drift(trainer)
        if isinstance(trainer.strategy, ShardedStrategy):
            _join(trainer, module)
        self._strategy = trainer.strategy
        data.layout = layout_of(trainer.strategy)
        data.setup("fit")
        module.configure_model()
        module.check_data(
            vocab_size=len(data.tokenizer), longest=data.longest, largest_id=data.largest_id
        )
        self._adapter = module.flat_adapter()
        self._versions = library_versions()
        self._settings = shared_settings(
            model=cast(Any, module.hparams),
            data=vars(data),
            federated=vars(rounds),
            trainer=trainer,
            base=module.peft_model,
            tokenizer=data.tokenizer,
        )

    def _make_trainer(self) -> Trainer:
        """One that trains nothing, for what it makes of the settings."""
        trainer = Trainer(**deepcopy(self._trainer_settings))
        split = isinstance(trainer.strategy, ShardedStrategy) and trainer.strategy.clients == 1
        if isinstance(trainer.strategy, LaidOut) and not split:
            raise ValueError(
                f"a node cannot train its one client under {type(trainer.strategy).__name__} as it "
                "is set up; take configs/strategy/ddp.yaml or fsdp.yaml, or one GPU"
            )
        if trainer.world_size > 1 and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"trainer.devices is {trainer.num_devices}, and a node's ranks are started by the "
                "node: give it --num_ranks, or devices 1"
            )
        return trainer

    def answer(self, letter: Letter, *, is_wanted: Callable[[], bool] | None = None) -> Letter:
        """What goes back to the server; never fails.

        An error is logged here. The server is told its kind alone, for its text may quote a sample.

        Args:
            letter: What the server says.
            is_wanted: Says whether anybody still waits for the answer; a visit ends early where
                nobody does. Not for several ranks, of which one alone would know.

        Raises:
            Exception: Where a rank of several fails within a visit: the others wait for it, and
                only its end ends them.
        """
        self._is_training = False
        try:
            kind = letter.facts.get("kind")
            if kind == HELLO:
                return self._greeted(Greeting.read(letter.facts)).letter()
            if kind == VISIT:
                order = VisitOrder.read(letter.facts)
                return self._visited(order, letter.tensors, [_Wanted(is_wanted)])
            raise ValueError(f"there are no letters of kind {kind!r} to a node")
        except Exception as error:
            log.exception("a letter of the server could not be answered")
            if self._is_training and self._data.layout.world.size > 1:
                raise
            return Failure(type(error).__name__).letter()

    def _greeted(self, greeting: Greeting) -> NodeFacts:
        return NodeFacts(
            run=greeting.run,
            client=self._data.client,
            num_samples=self._data.num_samples,
            num_answer_tokens=self._data.num_answer_tokens,
            filtered=self._data.counts(),
            settings=self._settings,
            versions=self._versions,
        )

    def _visited(self, order: VisitOrder, tensors: bytes, callbacks: list[Callback]) -> Letter:
        """Train, as `FederatedRounds` has a client trained."""
        encoding = self._checked(order)
        drift = self._rounds.client_drift
        names = _names_sent(drift, num_params=self._adapter.num_params)
        start, sent = unpack_adapter(self._adapter, tensors, names, encoding=encoding)
        held_out = HeldOutLoss(self._data.val_dataloader() if order.validate else [])
        told = _ToldDrift(drift, sent) if drift is not None else None
        settings = {**self._settings_of_visit(), "callbacks": [held_out, *callbacks]}
        started = time.perf_counter()
        self._is_training = True
        with _staying_on_device(self._module):
            update = train_client(
                self._module,
                self._batches(order),
                start=start,
                client=order.client,
                drift=told,
                trainer_settings=settings,
            )
        self._is_training = False
        report = VisitReport(
            run=order.run,
            ticket=order.ticket,
            round=order.round,
            client=order.client,
            name=order.name,
            loss=update.loss,
            num_steps=update.num_steps,
            num_tokens=update.num_tokens,
            num_samples=self._data.num_samples,
            num_answer_tokens=self._data.num_answer_tokens,
            seconds=round(time.perf_counter() - started, 3),
            start_nll=held_out.nll,
            start_tokens=held_out.num_tokens,
        )
        learnt = told.learnt if told is not None else {}
        return report.letter(
            pack_update(self._adapter, update.adapter, start, learnt, encoding=encoding)
        )

    def _settings_of_visit(self) -> dict[str, Any]:
        """Settings of a new Trainer; a base that is split stays with the groups that hold it."""
        settings = deepcopy(self._trainer_settings)
        if isinstance(self._strategy, ShardedStrategy):
            settings["strategy"].take_groups(self._strategy)
        return settings

    def _checked(self, order: VisitOrder) -> Encoding:
        """Refuse an order that is not for this client; returns how values travel."""
        if order.name != self._data.client:
            raise ValueError(f"an order for {order.name!r} came to {self._data.client!r}")
        if not 0 <= order.client < _MOST_CLIENTS:
            raise ValueError(f"client is {order.client}; expected 0 to {_MOST_CLIENTS - 1:,}")
        if not 0 <= order.round < order.num_rounds:
            raise ValueError(f"round is {order.round} of {order.num_rounds}; rounds count from 0")
        if order.encoding not in get_args(Encoding):
            raise ValueError(
                f"encoding is {order.encoding!r}; known are {', '.join(get_args(Encoding))}"
            )
        return cast(Encoding, order.encoding)

    def _batches(self, order: VisitOrder) -> DataLoader[TrainingBatch]:
        return self._data.batches(
            round_=order.round,
            num_rounds=order.num_rounds,
            number=order.number,
            client=order.client,
            local_steps=self._rounds.local_steps,
            local_epochs=self._rounds.local_epochs,
            num_micro=self._num_micro,
            seed=self._rounds.seed,
        )


class AbandonedError(RuntimeError):
    """Nobody waits for the answer any more."""


class _Wanted(Callback):
    """Ends a visit that nobody waits for."""

    def __init__(self, is_wanted: Callable[[], bool] | None) -> None:
        self._is_wanted = is_wanted

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self._is_wanted is not None and not self._is_wanted():
            raise AbandonedError("who asked for this visit has left")


class _ToldDrift(ClientDrift):
    """The drift of one visit, by what the server sent; keeps what goes back."""

    def __init__(self, rule: ClientDrift, sent: Mapping[str, Tensor]) -> None:
        self._rule = rule
        self._sent = sent
        self.learnt: dict[str, Tensor] = {}

    def correction(self, client: int, start: Tensor) -> Correction:
        return self._rule.remote_correction(start, self._sent)

    def collect(self, client: int, correction: Correction) -> None:
        self.learnt = correction.learnt()


def _join(trainer: Trainer, module: LoraLM) -> None:
    """Let the ranks that will hold a base together find each other, before it is loaded."""
    module.trainer = trainer
    trainer.strategy.connect(module)
    trainer.strategy.setup_environment()


@contextmanager
def _staying_on_device(module: LoraLM) -> Iterator[None]:
    """Keep a model where it is: Lightning moves it to the CPU, whole, whenever a fit ends."""
    module.cpu = lambda: module  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.cpu


def _names_sent(drift: ClientDrift | None, *, num_params: int) -> list[str]:
    """Names of the vectors that the server sends beside the adapter."""
    return list(drift.correction(0, torch.zeros(num_params)).sent()) if drift is not None else []
