"""The settings of a federation that must be the same: when a run resumes, and on all ranks.

Each function takes the settings of `FederatedRounds` by name.
"""

from collections.abc import Mapping
from typing import Any

from lightning import Trainer

from fedsafe.model.identity import numbers_of

_RUN = ("clients_per_round", "local_steps", "local_epochs", "mode", "weighting", "seed")
_RULES = ("server_optimizer", "client_drift", "cai")


def identity_of_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the run it resumes."""
    rules = (type(settings[name]).__name__ for name in ("server_optimizer", "client_drift"))
    cai = settings["cai"]
    return {
        **{f"federated.{name}": settings[name] for name in _RUN},
        "federated.algorithm": "+".join(rules),
        "federated.cai": cai.regime if cai is not None else None,
    }


def rules_of_round(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What may change from round to round, but not inside one."""
    rules: dict[str, Any] = {
        "federated.failure_probability": settings["failure_probability"],
    }
    for name in _RULES:
        rules |= numbers_of(name, settings[name])
    return rules


def settings_of_rank(
    settings: Mapping[str, Any], *, trainer: Trainer, model: Mapping[str, Any]
) -> dict[str, Any]:
    """What all ranks must share beside their data, rates and limits too.

    Args:
        settings: Of `FederatedRounds`.
        trainer: The rank's Trainer.
        model: Hyperparameters of the model.
    """
    names = ("max_epochs", "precision", "gradient_clip_val", "accumulate_grad_batches")
    rules = {
        f"{name}.{key}": value
        for name in _RULES
        for key, value in (vars(settings[name]).items() if settings[name] is not None else ())
        if isinstance(value, int | float | str)
    }
    return {
        **identity_of_run(settings),
        **rules_of_round(settings),
        **rules,
        **{f"model.{name}": value for name, value in model.items()},
        **{f"trainer.{name}": getattr(trainer, name) for name in names},
        "trainer.strategy": type(trainer.strategy).__name__,
        "trainer.world_size": trainer.world_size,
    }
