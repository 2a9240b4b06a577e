"""Where fedsafe keeps what is dear to make again: pretrained bases, verdicts."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder `$FEDSAFE_CACHE`, else `~/.cache/fedsafe`; it may not exist yet."""
    return Path(os.environ.get("FEDSAFE_CACHE", "~/.cache/fedsafe")).expanduser()
