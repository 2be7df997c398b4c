"""Runs over time in one SQLite file: raw lines as they were, and the figures that `show` draws.

A run is what its manifest says it is, so adding it twice keeps it once. The raw manifest and trials are kept whole
(compressed), unknown fields and all; figures are derived when a run is added, and anew where they are missing.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import metrics
from harness.errors import UserError
from harness.likeness import host_facts, prompt_facts, task_facts
from harness.results import Run, read_run
from harness.steps import Step, steps

VERSION = 1
FIGURES = {"tau": "task", "speedup": "machine", "peak_bytes": "machine"}
"what is drawn, and what must be alike: the task alone, or the machine as well"

SCHEMA = """
create table if not exists runs (
    id text primary key, name text not null, created text not null, git_commit text,
    task text not null, machine text not null, manifest blob not null, trials blob not null
);
create table if not exists figures (
    run text not null references runs (id) on delete cascade,
    cell text not null, label text not null, bits text not null, metric text not null,
    value real not null, low real, high real, synthetic integer not null,
    primary key (run, cell, metric)
);
"""


@dataclass(frozen=True)
class Point:
    """One figure of one run."""

    run: str
    created: str
    commit: str | None
    value: float
    low: float | None
    high: float | None
    synthetic: bool


@dataclass(frozen=True)
class Series:
    """One figure of one cell over runs of the same task (and machine), oldest first."""

    metric: str
    label: str
    bits: str
    machine: str
    "what the runs ran on, in words; nothing where the figure does not depend on it"
    points: tuple[Point, ...]

    @property
    def steps(self) -> list[Step]:
        return steps([point.value for point in self.points])


def add(path: Path, directories: Sequence[Path]) -> int:
    """Put runs into the file, which is made where there is none; how many were new. Raises UserError."""
    runs = [read_run(directory) for directory in directories]
    for run in runs:
        if not any(trial.outcome == "ok" for trial in run.rows):
            raise UserError(f"{run.directory} has no trial that was measured, so nothing to keep: finish the run first")
    with _opened(path) as file:
        return sum(_add(file, run) for run in runs)


def _add(file: sqlite3.Connection, run: Run) -> bool:
    manifest = (run.directory / "manifest.json").read_bytes()
    trials = run.directory / "trials.jsonl"
    raw = trials.read_bytes() if trials.is_file() else b""
    identity = [run.manifest.run, run.manifest.created, run.manifest.host, [cell.id for cell in run.manifest.cells]]
    id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    new = file.execute("select 1 from runs where id = ?", (id,)).fetchone() is None
    file.execute("delete from runs where id = ?", (id,))
    task, machine = task_facts(run) | prompt_facts(run), host_facts(run)
    del task["first_answers_sha256"]  # another machine may part at a near-tie, and the task is still the same
    file.execute(
        "insert into runs values (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(id, run.manifest.run, run.manifest.created, run.manifest.host.get("git_commit")),
            *(_text(task), _text(machine), zlib.compress(manifest), zlib.compress(raw)),
        ),
    )
    file.executemany("insert into figures values (?, ?, ?, ?, ?, ?, ?, ?, ?)", _figures(id, run))
    return new


def _figures(id: str, run: Run) -> Iterator[tuple[Any, ...]]:
    for row in metrics.summary(run):
        speedup = row.speedup
        found = {
            "tau": (row.tau, None, None),
            "speedup": (speedup.value, speedup.low, speedup.high) if speedup else (None, None, None),
            "peak_bytes": (row.peak_bytes, None, None),
        }
        for metric, (value, low, high) in found.items():
            if value is not None and not (row.is_baseline and metric != "peak_bytes"):
                yield id, row.cell.id, row.cell.label, row.cell.bits, metric, value, low, high, row.synthetic


def series(path: Path) -> list[Series]:
    """Everything that can be drawn, in the order of first appearance. Raises UserError where there is no history."""
    if not path.is_file():
        raise UserError(f"no history {path}: `python -m harness history add RUN` begins one")
    with _opened(path) as file:
        rows = file.execute(
            "select metric, cell, label, bits, task, machine, runs.name, created, git_commit, value, low, high, "
            "synthetic from figures join runs on runs.id = figures.run order by created, runs.id, figures.rowid"
        ).fetchall()
    groups: dict[tuple[str, str, str, str], list[Point]] = {}
    names: dict[tuple[str, str, str, str], tuple[str, str, str]] = {}
    for metric, cell, label, bits, task, machine, run, created, commit, value, low, high, synthetic in rows:
        place = machine if FIGURES[metric] == "machine" else ""
        key = (metric, cell, task, place)
        names[key] = (label, bits, _machine_name(place))
        groups.setdefault(key, []).append(Point(run, created, commit, value, low, high, bool(synthetic)))
    return [Series(key[0], *names[key], tuple(points)) for key, points in groups.items()]


def _machine_name(facts: str) -> str:
    if not facts:
        return ""
    known = json.loads(facts)
    return ", ".join(known.get("device name") or []) or str(known.get("cpu") or "an unknown machine")


def _text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True)


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction. Raises UserError for a file that is no history of this version or an older one."""
    try:
        with closing(sqlite3.connect(path)) as file, file:
            (version,) = file.execute("pragma user_version").fetchone()
            if version > VERSION:
                raise UserError(f"{path} is a history of version {version}, newer than {VERSION}: update the harness")
            tables = {name for (name,) in file.execute("select name from sqlite_master where type = 'table'")}
            if tables and (version == 0 or not {"runs", "figures"} <= tables):
                raise UserError(f"{path} is a database of another program: name another --file")
            file.execute("pragma foreign_keys = on")
            if not tables:
                file.executescript(SCHEMA)
                file.execute(f"pragma user_version = {VERSION}")
            yield file
    except sqlite3.DatabaseError as error:
        raise UserError(f"cannot use {path} as a history ({error}): name another --file") from error
