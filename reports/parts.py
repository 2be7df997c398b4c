"""A whole taken apart: a cell's peak memory by what holds it, its time by what a pass does, its trials by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.metrics import GIB, DepthAcceptance, Row, acceptance_by_depth
from harness.results import Run, Trial
from harness.stats import Interval
from reports.tables import grouped, plain

Parts = dict[str, float]
"amount by name; the amounts add up to the whole"
Bars = dict[str, Parts]
"by the name of the cell"
Good = dict[str, list[Trial]]
"good trials by cell"

UNATTRIBUTED = "unattributed"


def good_trials(run: Run) -> Good:
    """In file order; a trial measured twice counts once, as its last line says."""
    latest = {trial.key: trial for trial in run.rows}
    found: Good = {}
    for trial in latest.values():
        if trial.outcome == "ok":
            found.setdefault(trial.cell.id, []).append(trial)
    return found


def stacks(rows: Sequence[Row]) -> dict[str, Bars]:
    """What a pass's time (`phases`, ms) and a peak's memory (`memory`, GiB) are made of, for the cells that say so."""
    groups = grouped(rows)
    found: dict[str, Bars] = {"phases": {}, "memory": {}}
    for target, group in groups:
        for row in group:
            name = plain(row.cell.label) + f", {target}" * (len(groups) > 1)
            for kind, of in (("phases", phases(row)), ("memory", memory(row))):
                if of:
                    found[kind][name] = of
    return found


def memory(row: Row) -> Parts | None:
    """GiB by what holds them, at the peak and (slack) beyond it; None where a part or the peak is not known."""
    if row.memory is None:
        return None
    held = {name: size / GIB for name, size in row.memory.parts.items()}
    return held | {UNATTRIBUTED: max(row.memory.unattributed_bytes, 0) / GIB}


def phases(row: Row) -> Parts | None:
    """Milliseconds of a pass by what it does; None where no trial says so."""
    cost = row.round_cost
    if cost is None:
        return None
    told = {name: 1000 * seconds for name, seconds in cost.phase_seconds.items()}
    return told | {UNATTRIBUTED: 1000 * max(cost.unattributed_seconds, 0.0)}


@dataclass(frozen=True)
class CategoryLine:
    """One cell on the prompts of one category."""

    category: str
    prompts: int
    decode_tokens_per_second: float | None
    speedup: Interval | None
    tau: float | None
    acceptance: tuple[DepthAcceptance, ...]
    tokens_per_second_per_gib: float | None


def by_category(trials: Sequence[Trial], row: Row) -> list[CategoryLine]:
    """Nothing for a cell whose prompts are all of one category."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.category, []).append(trial)
    if len(groups) < 2:
        return []
    speedups = {part.category: part.speedup for part in row.speedup_by_category}
    return [_category_line(name, group, row, speedups.get(name)) for name, group in groups.items()]


def _category_line(name: str, trials: Sequence[Trial], row: Row, speedup: Interval | None) -> CategoryLine:
    tokens = sum(max(len(trial.new_tokens or ()) - 1, 0) for trial in trials)
    seconds = sum(trial.decode_seconds or 0.0 for trial in trials)
    passes = sum(len(trial.committed or ()) for trial in trials)
    speed = tokens / seconds if seconds else None
    return CategoryLine(
        category=name,
        prompts=len({trial.prompt_id for trial in trials}),
        decode_tokens_per_second=speed,
        speedup=speedup,
        tau=tokens / passes if passes else None,
        acceptance=acceptance_by_depth(trials),
        tokens_per_second_per_gib=speed / (row.peak_bytes / GIB) if speed and row.peak_bytes else None,
    )
