"""What `compare` finds, and what it does not, on a machine: one pool of rounds, and comparisons drawn from it.

    python -m benchmarks.pool record out/pool --rounds 40      # half an hour for the default model
    python -m benchmarks.pool judge out/pool

The pool holds `ar`, a decoder, and the same decoder with a planted slow-down, in the same shuffled rounds. A comparison
takes two disjoint sets of rounds, one for each side, and asks the program's own `compare` for the speed-up and for the
cost of a pass. A/A: the decoder against itself misses 1.0 where its interval leaves it out. Power: the slowed one
against the decoder is flagged where the interval lies on the worse side of 1. Comparisons share rounds with one
another, so their number is not a sample size.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from benchmarks.planted import write_entry_point
from harness.compare import compare, gather
from harness.gates import parse_gate
from harness.results import BASELINE, Cell, Run, read_run
from harness.stats import Interval

PLAIN, SLOWED = "burning:share=0", "burning:share=0.05"
GATES = {"speedup": parse_gate("speedup<0%"), "pass_cost": parse_gate("pass_cost>0%")}
app = App(name="python -m benchmarks.pool", help=__doc__)


@app.command
def record(
    out: Annotated[Path, Parameter(help="Directory of the pool, a run; an unfinished one goes on.")],
    /,
    *,
    rounds: int = 40,
    model: str | None = None,
    prompts: str = "quick",
    max_new_tokens: int = 32,
    bits: str = "32",
) -> int:
    """Record a pool of rounds."""
    entry_point = write_entry_point(out.absolute().parent / f"{out.name}.planted")
    root = Path(__file__).resolve().parent.parent
    paths = [str(entry_point), str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    command = [sys.executable, "-m", "harness", "run", "--methods", f"{PLAIN},{SLOWED}", "--rounds", str(rounds)]
    command += ["--prompts", prompts, "--max-new-tokens", str(max_new_tokens), "--bits", bits, "--out", str(out)]
    command += ["--model", model] if model else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(command, env=environment, check=False).returncode


@dataclass(frozen=True)
class Found:
    """What some comparisons of one kind came to."""

    kind: str
    metric: str
    rounds: int
    "on each side"
    comparisons: int
    flagged: int
    "A/A: the interval leaves 1 out; slowed: it lies on the worse side of 1"
    width: float
    "median, as a share of the value"


@app.command
def judge(
    pool: Annotated[Path, Parameter(help="Directory of a recorded pool.")], /, *, comparisons: int = 200, seed: int = 0
) -> None:
    """Say how often comparisons from the pool miss, and how often they find what was planted."""
    run = read_run(pool)
    print(
        f"{run.manifest.model}, {run.manifest.prompts} prompts, {recorded(run)} rounds, {comparisons} comparisons each"
    )
    for found in judged(run, comparisons, seed):
        print(
            f"{found.kind:9} {found.metric:9} {found.rounds:3} rounds a side: {found.flagged} of {found.comparisons} "
            f"({found.flagged / found.comparisons:.1%}), median width of the interval {found.width:.1%}"
        )


def judged(run: Run, comparisons: int, seed: int) -> Iterator[Found]:
    """For some numbers of rounds a side: the decoder against itself, and the slowed one against it."""
    count = recorded(run)
    for size in (size for size in (5, 10, 20) if 2 * size <= count):
        for kind, label in (("A/A", PLAIN), ("slowed 5%", SLOWED)):
            drawn = list(draws(count, size, comparisons, seed))
            each = [changes(run, PLAIN, label, base, new) for base, new in drawn]
            for metric, gate in GATES.items():
                intervals = [found[metric] for found in each]
                worse = [high < 1 if gate.below else low > 1 for low, high in intervals]
                outside = [not low <= 1 <= high for low, high in intervals]
                yield Found(
                    kind,
                    metric,
                    size,
                    comparisons,
                    sum(outside if kind == "A/A" else worse),
                    median(high / low - 1 for low, high in intervals),
                )


def recorded(run: Run) -> int:
    return 1 + max(trial.round for trial in run.rows)


def draws(count: int, size: int, comparisons: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Two disjoint sets of `size` rounds out of `count`, again and again."""
    dice = random.Random(f"{seed}/{size}")
    for _ in range(comparisons):
        drawn = dice.sample(range(count), 2 * size)
        yield drawn[:size], drawn[size:]


def changes(
    run: Run, base_label: str, new_label: str, base: Sequence[int], new: Sequence[int]
) -> dict[str, tuple[float, float]]:
    """The interval of each gated figure's change, by the program's own comparison."""
    before = gather("base", [taken(run, base_label, base)])
    after = gather("new", [taken(run, new_label, new)])
    found = compare(before, after, list(GATES.values()))
    (cell,) = [cell for cell in found.cells if cell.label == "decoder"]
    return {metric: _ends(cell.changes[metric].change) for metric in GATES}


def _ends(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


def taken(run: Run, label: str, rounds: Sequence[int]) -> Run:
    """The baseline and one decoder, called `decoder`, in some of the rounds."""
    chosen = set(rounds)
    rows = [
        trial if trial.cell.method == BASELINE else msgspec.structs.replace(trial, cell=renamed(trial.cell))
        for trial in run.rows
        if trial.round in chosen and trial.cell.label in (BASELINE, label)
    ]
    cells = [cell if cell.method == BASELINE else renamed(cell) for cell in run.manifest.cells]
    kept = {cell.id: cell for cell in cells if cell.label in (BASELINE, "decoder")}
    return replace(run, manifest=msgspec.structs.replace(run.manifest, cells=list(kept.values())), rows=tuple(rows))


def renamed(cell: Cell) -> Cell:
    return msgspec.structs.replace(cell, label="decoder", options={})


if __name__ == "__main__":
    sys.exit(app())
