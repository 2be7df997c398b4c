"""Where the harness keeps what it can make again."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError


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


def may_be_file(path: Path) -> Path:
    """The path. Raises UserError where a directory stands there."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file")
    return path


def save_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, and the folders above it where they are missing."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, None if metadata is None else dict(metadata))
    partial.replace(path)


def write_atomically(path: Path, content: bytes) -> bytes:
    """Write a file, and the folders above it where they are missing; the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    return content
