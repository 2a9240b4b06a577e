"""How callbacks follow what Lightning knows as one batch: a server visit, visits elsewhere."""

from lightning import Trainer


class RoundListener:
    """A callback of the Trainer that wants to know how clients on other machines get on."""

    def on_clients_progress(self, trainer: Trainer, doing: str) -> None:
        """Called with what the clients are doing, in a few words."""


class ServerVisitListener:
    """A callback of the Trainer that wants to know how a server visit goes on."""

    def on_server_progress(self, trainer: Trainer, doing: str) -> None:
        """Called with what the server is doing, in a few words."""

    def on_server_step(self, trainer: Trainer, num_done: int) -> None:
        """Called after each optimizer step but the last, when the visit may be put away."""
