"""When `--rounds auto` ends: every speed-up known as precisely as asked, or the time over. Pure.

Looking at an interval after every round and stopping at the first narrow one favours intervals that are narrow by luck;
a fewest number of rounds keeps that rare (the simulation in the tests says how rare).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.metrics import Row
from harness.stats import Interval


@dataclass(frozen=True)
class Pace:
    """What a run may take, in seconds since it began."""

    precision: float
    budget: float
    fewest: int
    most: int

    def ended(self, done: int, rows: Sequence[Row], elapsed: float, longest: float) -> str | None:
        """Why no further round shall begin, or None; `longest` is the longest round so far."""
        wide = widest(rows)
        if done >= self.fewest and wide is not None and width(wide[1]) < self.precision:
            return f"precise: the widest interval is {wide[0]}'s, {width(wide[1]):.1%} wide"
        if done >= self.fewest and wide is None:
            return "nothing to be precise about: no method has a speed-up"
        told = (
            f"the widest interval is {wide[0]}'s, {width(wide[1]):.1%} of its speed-up" if wide else "no interval yet"
        )
        if elapsed + longest > self.budget:
            return f"the time is over after {done} rounds: {told}, and {self.precision:.1%} was wanted"
        return f"{done} rounds are the most: {told}" if done >= self.most else None


def widest(rows: Sequence[Row]) -> tuple[str, Interval] | None:
    """The method whose speed-up is known least; None where nothing has one. Failed cells do not hold up a run."""
    known = [(row.cell.label, row.speedup) for row in rows if row.speedup is not None]
    return max(known, key=lambda pair: width(pair[1]), default=None)


def width(interval: Interval) -> float:
    """As a share of the value; infinite where there is none."""
    if interval.low is None or interval.high is None:
        return float("inf")
    return (interval.high - interval.low) / interval.value
