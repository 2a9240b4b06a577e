"""Silences what libraries say that is wrong here, or no news to a user; warnings of ours stay."""

import logging
import sys
import warnings

import datasets
from transformers.utils import logging as transformers_logging

from fedsafe.commands.launcher import is_first_rank

_WRONG_WARNINGS = (
    ".*LightningCLI's args parameter.*",
    # loaders are cheap here, and a round is an epoch
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*ended before the epoch ended and your dataloader is not resumable.*",
    ".*found .* module.* in eval mode.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    # a rank may have nothing to validate; what is logged is the same on all ranks already
    ".*method of metric MeanMetric was called before the ..update.. method.*",
    ".*recommended to use .self.log.*sync_dist=True.*",
    # `fedsafe export` parts weights that are shared; PEFT corrects the setting for each module
    ".*tie_word_embeddings=True. and a tied layer is part of the adapter.*",
    ".*fan_in_fan_out is set to .*",
    # between libraries, which a user can do nothing about
    ".*is_gradient_checkpointing. is deprecated.*",
    ".*isinstance.treespec, LeafSpec.. is deprecated.*",
)
_NO_NEWS = (
    "Tip:",
    "TPU available",
    "weights_only",
    "`max_epochs=",
    "recommend passing in an `attention_mask`",  # a pack has boundaries, and no padding
)


def quiet_known_noise() -> None:
    """Filter the warnings and lines named above, and progress bars where nobody watches."""
    for message in _WRONG_WARNINGS:
        warnings.filterwarnings("ignore", message)
    if not is_first_rank():  # all ranks read the same data, and find the same in it
        warnings.filterwarnings("ignore", category=UserWarning, module=r"fedsafe\.data\.")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_news)
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(part in text for part in _NO_NEWS)
