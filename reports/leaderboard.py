"""Several runs side by side: what may be compared stands in one table, and what may not says why.

A speed belongs to a machine, its libraries, a model, its prompts and the way they are decoded. Runs that agree in all
of these share a board; every other board names what it differs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.likeness import host_facts, prompt_facts, task_facts
from harness.metrics import Row
from harness.results import Run, refuse_mixture
from reports.tables import plain, target_name
from reports.words import device

WORDS = {
    "weights_sha256": "weights",
    "prompt set": "prompts",
    "prompts": "prompts' content",
    "max_new_tokens": "new tokens",
    "top_p": "top-p",
    "system": "system prompt",
    "raw": "raw prompts",
    "first_answers_sha256": "first answers",
    "acceptance": "drawn acceptance",
    "vram_budget_bytes": "memory budget in bytes",
    "device_map": "device map",
}
"of facts whose names are not words already"
Conditions = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    row: Row
    target: str
    "what tells it from those of all runs"
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
    cells = [row.cell for rows in summaries for row in rows]
    groups: list[tuple[Conditions, list[Entry]]] = []
    for index, (run, rows) in enumerate(zip(runs, summaries, strict=True)):
        held = conditions(run)
        found = next((entries for others, entries in groups if others == held), None)
        if found is None:
            groups.append((held, found := []))
        measured = [row for row in rows if row.decode_tokens_per_second]
        found += [Entry(row, target_name(row.cell, cells), plain(run.manifest.run), f"r{index}") for row in measured]
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
    host = host_facts(run)
    names = ", ".join(host.pop("device name")) or device(run)
    facts = {WORDS.get(name, name): value for name, value in (task_facts(run) | prompt_facts(run) | host).items()}
    versions = {f"version of {name}": number for name, number in sorted(m.versions.items())}
    return {"device": names, "number of prompts": m.prompts} | facts | versions


def differences(held: Conditions, first: Conditions) -> list[str]:
    return [
        plain(f"{name}: {_told(held.get(name))}, there {_told(first.get(name))}")
        for name in {**first, **held}
        if held.get(name) != first.get(name)
    ]


def _told(value: object) -> str:
    text = "not recorded" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
