"""A run in the terminal, and for a program: the same sentences and figures as on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from harness.metrics import Row
from harness.results import PRELIMINARY, Run
from harness.stats import Interval
from reports import tables, words


def show(run: Run, rows: Sequence[Row]) -> None:
    """The answer, the table as wide as the terminal allows, and what to beware of; no colour in a pipe."""
    console = Console(highlight=False, markup=False)
    for answer in words.sentences(run, rows):
        console.print(Text(answer, "bold"))
    console.print(tables.rich_table(rows))
    for line in (*words.changed_targets(run), *words.against_itself(rows)):
        console.print(Text(line), soft_wrap=True)
    for warning in tables.warnings(run, rows):
        console.print(Text(f"warning: {warning}", "yellow"), soft_wrap=True)
    if run.manifest.preliminary:
        console.print(PRELIMINARY, soft_wrap=True)


def as_json(runs: Sequence[Run], summaries: Sequence[Sequence[Row]]) -> str:
    """A list, one object a run, in one line."""
    return msgspec.json.encode([_run(run, rows) for run, rows in zip(runs, summaries, strict=True)]).decode()


def _run(run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    m, where = run.manifest, words.device(run)
    planned = ("run", "created", "model", "prompt_set", "prompts", "rounds", "max_new_tokens", "preliminary")
    return {name: getattr(m, name) for name in planned} | {
        "device": where,
        "answers": words.sentences(run, rows),
        "warnings": tables.warnings(run, rows),
        "failures": tables.failures(rows),
        "rows": [numbers(row) for _, group in tables.grouped(rows) for row in group],
    }


def numbers(row: Row) -> dict[str, Any]:
    """One cell, raw: the unit is in the name, absent is None."""
    cell = row.cell
    names = ("model", "bits", "dtype", "weights", "runtime", "device", "context")
    measured = ("decode_tokens_per_second", "end_to_end_tokens_per_second", "first_token_seconds", "tau", "peak_bytes")
    per = ("tokens_per_second_per_gib", "break_even_tau", "joules_per_token", "host_syncs_per_pass", "rank")
    return {
        "method": cell.label,
        **{name: getattr(cell, name) for name in names},
        "baseline": row.is_baseline,
        "synthetic": row.synthetic,
        **{name: getattr(row, name) for name in ("trials_ok", "trials_failed", "prompts", "new_tokens")},
        **{name: getattr(row, name) for name in measured},
        **interval("speedup", row.speedup),
        **interval("speedup_prompts", row.speedup_prompts),
        **{name: getattr(row, name) for name in per},
        "verdict": row.verdict.kind,
        "answers": row.verdict.answers,
        "answers_differing": row.verdict.differing,
    }


def interval(name: str, of: Interval | None) -> dict[str, float | None]:
    return {
        name: of.value if of else None,
        f"{name}_low": of.low if of else None,
        f"{name}_high": of.high if of else None,
    }
