"""How sure each figure is: both intervals of every figure, overall and by category, as rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.intervals import ALL, Figures, of_run
from harness.metrics import GIB, Row
from harness.results import Run
from harness.stats import Interval
from reports.tables import NOTHING, grouped, plain

HEADERS = {
    "speed": "tok/s",
    "speedup": "speed-up",
    "tau": "τ",
    "peak_bytes": "peak GiB",
    "per_gib": "tok/s per GiB",
    "per_gib_relative": "per GiB, to the baseline",
}


@dataclass(frozen=True)
class Line:
    """One method in one category: texts by header, of the interval over rounds and of the one over prompts."""

    target: str
    method: str
    category: str
    rounds: dict[str, str]
    prompts: dict[str, str]


def lines(run: Run, rows: Sequence[Row]) -> Iterator[Line]:
    """Methods as the results table has them; for each first all prompts, then every category."""
    found = of_run(run)
    for target, group in grouped(rows):
        for row in group:
            for category, figures in found.get(row.cell.id, {}).items():
                name = "all prompts" if category == ALL else plain(category)
                rounds, prompts = _texts(figures, "rounds"), _texts(figures, "prompts")
                yield Line(target, plain(row.cell.label), name, rounds, prompts)


def _texts(figures: Figures, kind: str) -> dict[str, str]:
    return {
        header: told(getattr(figures[name], kind), 1 / GIB if name == "peak_bytes" else 1.0)
        if name in figures
        else NOTHING
        for name, header in HEADERS.items()
    }


def told(interval: Interval, factor: float = 1.0) -> str:
    """`1.52 (1.47 to 1.58)`; the value alone where there is no interval."""
    value, low, high = (None if end is None else end * factor for end in (interval.value, interval.low, interval.high))
    assert value is not None
    digits = 1 if value >= 10 else 2 if value >= 1 else 3
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
