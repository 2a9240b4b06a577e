"""`ClientParallelStrategy`: clients in parallel, each trained by one rank from start to end."""

import signal
import threading
from datetime import timedelta
from functools import partial
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import nn

from fedsafe.federated.exchange import ExchangeMode
from fedsafe.model.flat_adapter import WholeAdapter
from fedsafe.peers import Peers
from fedsafe.strategies.layout import LaidOut, Layout


class ClientParallelStrategy(LaidOut, DDPStrategy):
    """Trains as many clients at once as there are ranks; each rank holds the whole base.

    No gradient travels. Ranks speak once a round, when the clients' updates become one.

    Args:
        exchange: What ranks tell each other at a round's end: weighted `sums`, whose memory does
            not grow with the clients, or every client's update in turn (`updates`), which is
            bit-equal to one process where the sums all but always are.
        timeout: How long a rank waits for the others, such as 12:00:00, before the run ends; give
            more than the first to end a round ever waits for the last.
        process_group_backend: How ranks speak; None takes nccl on GPUs and gloo on CPUs.
    """

    def __init__(
        self,
        exchange: ExchangeMode = "sums",
        timeout: timedelta = timedelta(hours=12),
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(timeout=timeout, process_group_backend=process_group_backend)
        self.exchange: ExchangeMode = exchange

    @property
    def layout(self) -> Layout:
        """Every rank is a client group of its own and holds a replica."""
        everyone = Peers(self.global_rank, self.world_size)
        return Layout(clients=everyone, replicas=everyone, world=everyone)

    def setup(self, trainer: Trainer) -> None:
        """Set up as on one device: DDP would wrap the model and send the base from rank 0."""
        ParallelStrategy.setup(self, trainer)
        # Lightning has all ranks meet before every batch, to hear of a SIGTERM to one of them; they
        # would wait for whichever has the longer batch. Each hears of its own SIGTERM alone.
        loop = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = _say_nothing  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, partial(_note_sigterm, trainer))

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]  # no wrapper
        """Make all ranks begin with the same adapter; the base each has loaded itself."""
        adapter = WholeAdapter(model.named_parameters())
        adapter.write(self.layout.world.broadcast_(adapter.read(), source=0))
        return model


def _say_nothing() -> None:
    pass


def _note_sigterm(trainer: Trainer, *_: Any) -> None:
    """Stop behind the batch; Lightning's own handler would speak to the others."""
    trainer._signal_connector.received_sigterm = True
