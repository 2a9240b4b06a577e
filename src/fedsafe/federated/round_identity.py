"""The settings of a federation that must be the same: when a run resumes, and on all ranks.

Each function takes the settings of `FederatedRounds` by name.
"""

from collections.abc import Mapping
from typing import Any

from lightning import Trainer

from fedsafe.federated.checkpoint import RoundCheckpoint
from fedsafe.model.identity import numbers_of, refuse_difference
from fedsafe.strategies.layout import Layout, exchange_of

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


def refuse_unfit(saved: Mapping[str, Any], current: Mapping[str, Any], *, layout: Layout) -> None:
    """Refuse a checkpoint that this run cannot go on from.

    Args:
        saved: State of `FederatedRounds` in the checkpoint.
        current: Its `identity` and `rules_of_round` now.
        layout: Who does what now.

    Raises:
        ValueError: Names what differs, or what the checkpoint lacks.
    """
    refuse_difference(saved["identity"], current["identity"])
    if not saved["batches_done"]:
        return
    refuse_difference(saved["rules_of_round"], current["rules_of_round"])
    if saved["batches_done"] % current["rules_of_round"]["trainer.accumulate_grad_batches"]:
        raise ValueError(
            "the checkpoint was written between accumulated parts of a step and lacks their "
            "gradients; resume from one that was written after a step"
        )
    if layout.clients.size > 1:
        raise ValueError(
            f"the checkpoint was written inside round {saved['round'] + 1}, by ranks that trained "
            "one client at a time, and these train several; resume it under the strategy that "
            "wrote it until a round has ended"
        )


def settings_of_rank(
    settings: Mapping[str, Any], *, trainer: Trainer, model: Mapping[str, Any], layout: Layout
) -> dict[str, Any]:
    """What all ranks must share beside their data, rates and limits too.

    Args:
        settings: Of `FederatedRounds`.
        trainer: The rank's Trainer.
        model: Hyperparameters of the model.
        layout: Who does what.
    """
    names = (
        "max_epochs",
        "precision",
        "gradient_clip_val",
        "gradient_clip_algorithm",
        "accumulate_grad_batches",
        "limit_val_batches",
        "check_val_every_n_epoch",
        "ckpt_path",
    )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    saving = [each.every_n_steps for each in callbacks if isinstance(each, RoundCheckpoint)]
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
        "trainer.callbacks": [type(each).__name__ for each in callbacks],
        "checkpoint.every_n_steps": saving,
        "trainer.strategy": type(trainer.strategy).__name__,
        "strategy.exchange": exchange_of(trainer.strategy),
        "strategy.clients": layout.clients.size,
        "ranks that share a step": layout.data.size,
        "ranks": layout.world.size,
    }
