"""Where the harness keeps what it can make again."""

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The folder named by HARNESS_CACHE, else `spec-harness` in the platform's own cache folder; not created here."""
    if chosen := os.environ.get("HARNESS_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "spec-harness"
