"""Settings of the Trainer under which rounds would go wrong without a sign of it."""

from lightning import Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

from fedsafe.federated.checkpoint import RoundCheckpoint
from fedsafe.strategies.layout import layout_of

_NEEDED: dict[str, tuple[int | float, str]] = {
    "reload_dataloaders_every_n_epochs": (1, "each would train on the batches of the first"),
    "limit_train_batches": (1.0, "visits would be cut short"),
    "overfit_batches": (0.0, "visits would be cut short"),
    "val_check_interval": (1.0, "a client's half-trained adapter would be validated"),
    "max_steps": (-1, "the run would end inside a round; give max_epochs, the number of rounds"),
}
"""Settings, the value that rounds need, and what another one would do."""

_FORBIDDEN = (GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging)
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def check_trainer(trainer: Trainer, *, corrects_gradients: bool = False) -> None:
    """Refuse a Trainer that would train something else than asked for.

    Args:
        trainer: The Trainer of the run.
        corrects_gradients: Whether a `ClientDrift` changes the gradients.

    Raises:
        ValueError: Names the setting, its value and the one that rounds need.
    """
    for name, (value, consequence) in _NEEDED.items():
        given = getattr(trainer, name)
        # as text: limit_train_batches 1 is one batch and 1.0 is all of them
        if repr(given) != repr(value):
            raise ValueError(
                f"Trainer({name}={given!r}): rounds need {name}={value!r}, otherwise {consequence}"
            )
    if layout_of(trainer.strategy).clients.size > 1:
        _check_ranks_apart(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer):
            raise ValueError(
                "rounds cannot run with max_time or a Timer, which would end the run inside a "
                "round; leave it out, and stop and resume the run instead"
            )
        if isinstance(callback, _FORBIDDEN):
            raise ValueError(
                f"rounds cannot run with {type(callback).__name__}, which knows of no visits; "
                "leave it out of the Trainer's callbacks"
            )
    if trainer.precision not in _PRECISIONS:
        raise ValueError(
            f"Trainer(precision={trainer.precision!r}) would round the adapter, which is averaged "
            f"in float32; give one of {', '.join(_PRECISIONS)}, and the base's type as model.dtype"
        )
    if corrects_gradients:
        check_precision_for_drift(trainer)
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        raise ValueError(
            f"max_epochs is {trainer.max_epochs}; it is the number of rounds, give >= 1"
        )


def _check_ranks_apart(trainer: Trainer) -> None:
    """Refuse what ranks that train different clients cannot do."""
    if trainer.precision == "16-mixed":
        raise ValueError(
            "Trainer(precision='16-mixed') scales the gradients of ranks that train different "
            "clients differently; give 'bf16-mixed' or '32-true'"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RoundCheckpoint) and callback.every_n_steps is not None:
            raise ValueError(
                f"checkpoint.every_n_steps is {callback.every_n_steps}, but ranks that train "
                "different clients are checkpointed between rounds alone; leave it out"
            )


def check_precision_for_drift(trainer: Trainer) -> None:
    """Refuse gradients that are scaled when a client drift would correct them.

    Raises:
        ValueError: If the precision is `16-mixed`.
    """
    if trainer.precision == "16-mixed":
        raise ValueError(
            "Trainer(precision='16-mixed') scales the gradients that client_drift corrects; give "
            "'bf16-mixed' or '32-true', or leave client_drift out"
        )
