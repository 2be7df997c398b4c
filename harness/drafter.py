"""Drafter checkpoints: one safetensors file, its configuration and its training cost in the metadata.

Found, in this order: the method's `drafter` option (a file, a directory or a hub id), what `harness train` left in the
cache for this model, and what ships with the package for the default model. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.paths import cache_dir, save_tensors

SHIPPED = Path(__file__).resolve().parent.parent / "methods" / "drafters"


def slug(model: str) -> str:
    """A model's name as a folder name."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in model.lower()).strip("-")


def find(method: str, option: str | None, model: str) -> Path | None:
    """The drafter for `model`, or None where there is none. Raises UserError for a named one that is missing."""
    if option is not None:
        return _named(option)
    for folder in (cache_dir() / "drafters", SHIPPED):
        path = folder / slug(model) / f"{method}.safetensors"
        if path.is_file():
            return path
    return None


def _named(option: str) -> Path:
    path = Path(option).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", option):
        raise UserError(f"no drafter at {option}: give a .safetensors file, a directory or a hub id (org/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(option, allow_patterns=["*.safetensors", "config.json"]))
    except Exception as error:
        raise UserError(f"drafter {option!r} is no local path, and the hub cannot give it: {error}") from None


def write(path: Path, tensors: dict[str, Any], config: dict[str, Any], training: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    save_tensors(path, tensors, {"config": json.dumps(config), "training": json.dumps(training)})


def metadata(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, training) of a checkpoint; of a directory, its config.json and no training.

    Raises UserError for a file that is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        config = path / "config.json"
        return (json.loads(config.read_text()) if config.is_file() else {}), {}
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"the drafter {path} is no safetensors file ({error}): name another") from None
    config_path = path.with_name("config.json")
    if "config" in stored:
        return json.loads(stored["config"]), json.loads(stored.get("training", "{}"))
    return (json.loads(config_path.read_text()) if config_path.is_file() else {}), {}


def files(path: Path) -> list[Path]:
    """What a checkpoint is read from: the one file, or the weights and the configuration of a directory."""
    return sorted((*path.glob("*.safetensors"), *path.glob("config.json"))) if path.is_dir() else [path]


def tensors(path: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, on the CPU. Raises UserError where only pickled weights exist."""
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .safetensors file; pickled weights are never loaded: convert them first")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def refuse_misfit(wanted: Mapping[str, Any], given: Mapping[str, Any], method: str) -> None:
    """Raises ValueError where a checkpoint lacks a tensor, has one too many, or has one of another shape."""
    odd = wanted.keys() ^ given.keys()
    odd |= {name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape}
    if odd:
        raise ValueError(
            f"this {method} drafter does not fit the target (look at its {min(odd)}): name one that was trained for it"
        )


def rank_accuracy(config: dict[str, Any], depths: int, rows: int) -> list[list[float]]:
    """How often the r-th guess of `rows` for depth i is right, measured in training; a plausible fall-off where nobody
    did."""
    assumed = [[0.5 * 0.8**depth * 0.35**rank for rank in range(10)] for depth in range(depths)]
    return [ranks[:rows] for ranks in (config.get("rank_accuracy") or assumed)[:depths]]
