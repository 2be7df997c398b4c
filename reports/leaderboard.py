"""Several runs side by side: what may be compared stands in one table, and what may not says why.

A speed belongs to a machine, its libraries, a model, its prompts and the way they are decoded. Runs that agree in all
of these share a board; every other board names what it differs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.metrics import Row
from harness.results import Run, refuse_mixture
from reports.tables import grouped, plain
from reports.words import device

HOST = ("cpu", "threads", "torch_threads", "devices")
PLAN = {
    "model": "model",
    "weights_sha256": "weights",
    "prompt_set": "prompts",
    "prompt_set_sha256": "prompts' content",
    "prompts": "number of prompts",
    "max_new_tokens": "new tokens",
    "temperature": "temperature",
    "top_p": "top-p",
    "system": "system prompt",
    "raw": "chat template",
    "first_answers_sha256": "first answers",
}
Conditions = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    row: Row
    target: str
    run: str
    anchor: str
    "of the run's own part of the page"


@dataclass(frozen=True)
class Board:
    title: str
    differs: tuple[str, ...]
    "from the first board, in words; nothing for the first itself"
    entries: tuple[Entry, ...]


def boards(runs: Sequence[Run], summaries: Sequence[Sequence[Row]]) -> list[Board]:
    """In the order of the runs, the fastest first in each. Raises UserError for synthetic runs beside real ones."""
    refuse_mixture(*runs)
    groups: list[tuple[Conditions, list[Entry]]] = []
    for index, (run, rows) in enumerate(zip(runs, summaries, strict=True)):
        held = conditions(run)
        found = next((entries for others, entries in groups if others == held), None)
        if found is None:
            groups.append((held, found := []))
        named = [(target, row) for target, group in grouped(rows) for row in group if row.decode_tokens_per_second]
        found += [Entry(row, target, plain(run.manifest.run), f"r{index}") for target, row in named]
    first = groups[0][0] if groups else {}
    return [
        Board(
            plain(f"{held['model']} on {held['device']}"),
            tuple(differences(held, first)),
            tuple(sorted(entries, key=lambda entry: -(entry.row.decode_tokens_per_second or 0.0))),
        )
        for held, entries in groups
    ]


def conditions(run: Run) -> Conditions:
    """What two runs must have in common before their speeds may be compared."""
    m = run.manifest
    host = {name: m.host.get(name) for name in HOST}
    versions = {f"version of {name}": number for name, number in sorted(m.versions.items())}
    plan = {name: getattr(m, field) for field, name in PLAN.items()}
    return {"device": device(run)} | plan | host | versions


def differences(held: Conditions, first: Conditions) -> list[str]:
    return [
        plain(f"{name}: {_told(held.get(name))}, there {_told(first.get(name))}")
        for name in {**first, **held}
        if held.get(name) != first.get(name)
    ]


def _told(value: object) -> str:
    text = "not recorded" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
