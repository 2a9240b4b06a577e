"""How callbacks follow a server visit, which Lightning knows as one batch."""

from lightning import Trainer


class ServerVisitListener:
    """A callback of the Trainer that wants to know how a server visit goes on."""

    def on_server_progress(self, trainer: Trainer, doing: str) -> None:
        """Called with what the server is doing, in a few words."""

    def on_server_step(self, trainer: Trainer, num_done: int) -> None:
        """Called after each optimizer step but the last, when the visit may be put away."""
