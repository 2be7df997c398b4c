"""Synthetic runs: `run(...)` makes a Run whose every figure is chosen by the test. No real measurement is here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.results import Cell, Judged, Manifest, Memory, Run, Trial, append_trial, write_manifest

MIB, GIB_BYTES = 2**20, 2**30


def cell(method: str = "ar", **changes: Any) -> Cell:
    fields = {"label": method, "model": "toy", "bits": "32", "dtype": "float32", "device": "cuda"}
    return Cell(method=method, **fields | changes)


def trial(
    of: Cell,
    committed: Sequence[int] = (1, 1, 1),
    seconds_per_pass: float = 0.1,
    *,
    tokens: Sequence[int] | None = None,
    depth: int | None = None,
    peak_bytes: int = 512 * MIB,
    **changes: Any,
) -> Trial:
    """A good trial that commits these tokens a pass; `depth` nodes are drafted a pass (0 for `ar`, else 4)."""
    new_tokens = list(range(sum(committed) + 1)) if tokens is None else list(tokens)
    depth = (0 if of.method == "ar" else 4) if depth is None else depth
    fields: dict[str, Any] = {
        "run": "synthetic",
        "cell": of,
        "round": 0,
        "order": 0,
        "prompt_set": "toy",
        "prompt_id": "p0",
        "category": "writing",
        "turn": 0,
        "outcome": "ok",
        "prompt_tokens": 16,
        "max_new_tokens": 128,
        "new_tokens": new_tokens,
        "text": " ".join(map(str, new_tokens)),
        "prefill_seconds": 0.2,
        "decode_seconds": seconds_per_pass * len(committed),
        "round_seconds": [seconds_per_pass] * len(committed),
        "drafted": [depth] * len(committed),
        "drafted_depth": [depth] * len(committed),
        "accepted": [count - 1 for count in committed],
        "committed": list(committed),
        "host_syncs": len(committed),
        "memory": Memory(peak_allocated_bytes=peak_bytes, peak_rss_bytes=4 * peak_bytes),
    }
    return Trial(**fields | changes)


def failed(of: Cell, outcome: str = "oom", reason: str = "out of memory", **changes: Any) -> Trial:
    """A trial as the worker writes it when it fails: an outcome, a reason, and no measurement."""
    planned = {
        name: getattr(trial(of), name) for name in ("run", "order", "prompt_set", "prompt_id", "category", "turn")
    }
    return Trial(cell=of, outcome=outcome, reason=reason, **{"round": 0} | planned | changes)


def written(of: Run, directory: Path) -> Path:
    """The run's files, as the program writes them; the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    write_manifest(directory, of.manifest)
    for each in of.rows:
        append_trial(directory / "trials.jsonl", each)
    return directory


def run(*trials: Trial, directory: Path = Path("."), skipped_lines: int = 0, **changes: Any) -> Run:
    cells = {each.cell.id: each.cell for each in trials}
    fields: dict[str, Any] = {
        "run": "synthetic",
        "created": "2026-01-02T03:04:05Z",
        "command": ["python", "-m", "harness", "run"],
        "model": "toy",
        "prompt_set": "toy",
        "prompt_set_sha256": "0" * 64,
        "prompts": len({each.prompt_id for each in trials}),
        "turns": 1,
        "cells": list(cells.values()),
        "rounds": len({each.round for each in trials}),
        "seed": 0,
        "max_new_tokens": 128,
        "host": {"device": "toy device"},
        "versions": {"harness": "0"},
    }
    return Run(directory, Manifest(**fields | changes), trials, skipped_lines)


def judged(of: Run, judgements: tuple[Judged, ...]) -> Run:
    """The run with what float64 says of its differing texts."""
    return replace(of, judged=judgements)
