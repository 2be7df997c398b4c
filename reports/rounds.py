"""Where a round's time goes, by phase, and the speed-up that follows: tau / (cost of a round in baseline steps)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.metrics import Row
from reports.tables import (
    NOTHING,
    grouped,
    markdown_text,
    method,
    number,
    plain,
    scaled,
    target_name,
    times,
)

if TYPE_CHECKING:
    from rich.table import Table

PHASES = ("draft", "verify", "accept", "commit", "host")
READ = {
    "τ/steps": "speed-up = τ / steps, a round's cost in steps of the baseline",
    "floor": "floor: share of what the bandwidth allows",
}
READ_AS = "; ".join(READ.values())


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One dict a row that tells its phases, header to text."""
    cells = [row.cell for row in rows]
    return [
        {"method": method(row), "bits": target_name(row.cell, cells), **record(row)}
        for _, group in grouped(rows)
        for row in group
        if row.round_cost is not None
    ]


def record(row: Row) -> dict[str, str]:
    """Times in ms; empty for a row that does not tell them."""
    cost = row.round_cost
    if cost is None:
        return {}
    explained = NOTHING
    if cost.explained_speedup is not None and cost.difference is not None:
        explained = f"{times(cost.explained_speedup)} ({cost.difference:+.1%})"
    return {
        "round ms": scaled(cost.measured_seconds, 1000, 2),
        **{name: scaled(cost.phase_seconds.get(name), 1000, 2) for name in PHASES},
        "unattributed": scaled(cost.unattributed_seconds, 1000, 2) + " (more than 3 %)" * (not cost.adds_up),
        "τ": number(row.tau, 2),
        "steps": number(cost.steps, 2),
        "τ / steps (against measured)": explained,
        "measured speed-up": "1 by definition" if row.is_baseline else _measured(row),
        "bandwidth floor reached": NOTHING if row.floor_share is None else f"{row.floor_share:.0%}",
    }


def _measured(row: Row) -> str:
    return NOTHING if row.speedup is None else times(row.speedup.value)


def markdown(rows: Sequence[Row]) -> str:
    """A GitHub table; empty where no row tells its phases."""
    records = table(rows)
    if not records:
        return ""
    headers = list(records[0])
    rule = ["---" if header in ("method", "bits") else "---:" for header in headers]
    lines = [headers, rule, *([markdown_text(text) for text in each.values()] for each in records)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rich_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """For the terminal, one a target whose rows tell their phases."""
    for target, group in grouped(rows):
        told = [row for row in group if row.round_cost is not None]
        if told:
            yield _terminal_table(target, told)


def _terminal_table(target: str, group: Sequence[Row]) -> Table:
    from rich.table import Table
    from rich.text import Text

    mark = " SYNTHETIC" * any(row.synthetic for row in group)
    shown = Table(
        title=f"\n{target}{mark}: where a round's ms go",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    records = [_terminal_record(row) for row in group]
    headers = [header for header in records[0] if any(each[header] != NOTHING for each in records)]
    shown.caption = "; ".join(READ[header] for header in headers if header in READ)
    for header in headers:
        shown.add_column(
            header, justify="left" if header == "method" else "right", overflow="fold", no_wrap=header != "method"
        )
    for row, each in zip(group, records, strict=True):
        shown.add_row(*(Text(each[header], "bold" if row.is_baseline else "") for header in headers))
    return shown


def _terminal_record(row: Row) -> dict[str, str]:
    told, cost = record(row), row.round_cost
    off = NOTHING if cost is None or cost.difference is None else f"{cost.difference:+.1%}"
    explained = None if cost is None else cost.explained_speedup
    return {
        "method": plain(row.cell.label),
        "round": told["round ms"],
        **{name: told[name] for name in PHASES},
        "steps": told["steps"],
        "τ/steps": NOTHING if explained is None else times(explained),
        "against\nmeasured": off,
        "floor": told["bandwidth floor reached"],
    }
