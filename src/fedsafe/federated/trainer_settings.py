"""Settings of the Trainer under which rounds would go wrong without a sign of it."""

from lightning import Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)

_NEEDED: dict[str, tuple[int | float, str]] = {
    "reload_dataloaders_every_n_epochs": (1, "each would train on the batches of the first"),
    "limit_train_batches": (1.0, "visits would be cut short"),
    "overfit_batches": (0.0, "visits would be cut short"),
    "val_check_interval": (1.0, "a client's half-trained adapter would be validated"),
    "world_size": (1, "every device would repeat the same work"),
}
"""Settings, the value that rounds need, and what another one would do."""

_FORBIDDEN = (GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging)
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def check_trainer(trainer: Trainer) -> None:
    """Refuse a Trainer that would train something else than asked for.

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
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
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
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        raise ValueError(
            f"max_epochs is {trainer.max_epochs}; it is the number of rounds, give >= 1"
        )
