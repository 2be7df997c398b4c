"""Both 95 % intervals of every figure that a reader may rank by, over all prompts and in each category. Pure.

"For these prompts on this machine" is over rounds, each a fresh process; "for prompts like these" is over prompts. A
greedy method's tau is the same in every round, so its first interval has no width: only other prompts can change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import log
from statistics import geometric_mean, stdev
from typing import Any

import numpy as np
import pandas as pd

from harness.metrics import GIB, Row, trial_frame
from harness.results import BASELINE, Cell, Run
from harness.stats import (
    Interval,
    Ratio,
    bootstrap_over_prompts,
    change_between_rounds,
    ratio_interval_over_rounds,
    standings,
)

Column = np.ndarray[Any, np.dtype[Any]]

ALL = ""
"the category of all prompts together"
FEWEST_ROUNDS_AGAINST_ITSELF = 4


@dataclass(frozen=True)
class Both:
    """One figure's interval over rounds, and over prompts; the value may differ where one side needs means."""

    rounds: Interval
    prompts: Interval


Figures = dict[str, Both]
"speed (tok/s), tau, peak_bytes, per_gib (tok/s per GiB), speedup and per_gib_relative (to the baseline)"


def of_run(run: Run) -> dict[str, dict[str, Figures]]:
    """By cell id and category (ALL first), every figure that the trials give."""
    frame = trial_frame(run)
    good = frame[(frame.outcome == "ok") & (frame.decode_tokens > 0) & (frame.decode_seconds > 0)]
    cells = {cell.id: cell for cell in run.manifest.cells}
    samples = {str(id): Samples.of(part) for id, part in good.groupby("cell", sort=False)}
    return {id: dict(_by_category(samples.get(id), samples.get(_baseline(id, cells)))) for id in cells}


def _baseline(id: str, cells: dict[str, Cell]) -> str:
    """Id of the baseline of another cell; nothing for a baseline."""
    found = (other.id for other in cells.values() if other.method == BASELINE and other.target == cells[id].target)
    return "" if cells[id].method == BASELINE else next(found, "")


@dataclass(frozen=True)
class Samples:
    """Good trials of one cell, an entry each: arrays, because a large run asks for thousands of intervals."""

    category: Column
    prompt: Column
    turn: Column
    round: Column
    tokens: Column
    seconds: Column
    passes: Column
    peak_bytes: Column

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Samples:
        names = ("category", "prompt_id", "turn", "round", "decode_tokens", "decode_seconds", "verify_passes")
        return cls(*(frame[name].to_numpy() for name in (*names, "peak_bytes")))

    def at(self, entries: Column) -> Samples:
        return Samples(*(getattr(self, field.name)[entries] for field in fields(self)))

    def paired(self, other: Samples) -> tuple[Samples, Samples]:
        """Both sides' entries of the same prompt, turn and round."""
        theirs = {key: index for index, key in enumerate(other.keys())}
        both = [(index, theirs[key]) for index, key in enumerate(self.keys()) if key in theirs]
        own, others = np.array(both, int).reshape(-1, 2).T
        return self.at(own), other.at(others)

    def keys(self) -> Iterator[tuple[str, int, int]]:
        return zip(self.prompt.tolist(), self.turn.tolist(), self.round.tolist(), strict=True)

    @cached_property
    def turns(self) -> list[int]:
        """A number for each entry, the same for those of the same turn of the same prompt."""
        numbers: dict[tuple[str, int], int] = {}
        both = zip(self.prompt.tolist(), self.turn.tolist(), strict=True)
        return [numbers.setdefault(turn, len(numbers)) for turn in both]

    def held(self) -> Samples:
        """Seconds times the peak of their round in GiB: tokens over these are a speed per GiB."""
        rounds, code = np.unique(self.round, return_inverse=True)
        peaks = np.array([self.peak_bytes[code == index].max() for index in range(len(rounds))])
        return replace(self, seconds=self.seconds * peaks[code] / GIB)

    @property
    def knows_memory(self) -> bool:
        return not np.isnan(self.peak_bytes).any()


def _by_category(own: Samples | None, base: Samples | None) -> Iterator[tuple[str, Figures]]:
    if own is None:
        return
    yield ALL, _figures(own, base)
    for category in dict.fromkeys(own.category.tolist()):
        yield str(category), _figures(own.at(own.category == category), base)


def _figures(own: Samples, base: Samples | None) -> Figures:
    """Of one cell's good trials; those against the baseline over the trials that both finished."""
    found = {"speed": _rate(own, own.tokens, own.seconds), "tau": _rate(own, own.tokens, own.passes)}
    if own.knows_memory:
        found["peak_bytes"] = Both(_mean_of_peaks(own, own.round), _mean_of_peaks(own, own.prompt))
        found["per_gib"] = _rate(own, own.tokens, own.held().seconds)
    if base is None:
        return found
    mine, theirs = own.paired(base)
    if not len(mine.tokens):
        return found
    found["speedup"] = _against(mine, theirs)
    if own.knows_memory and base.knows_memory:
        found["per_gib_relative"] = _against(mine.held(), theirs.held())
    return found


def _against(mine: Samples, theirs: Samples) -> Both:
    """Of pairs."""
    rounds, prompts = (
        (_sums(unit, mine.tokens, mine.seconds), _sums(unit, theirs.tokens, theirs.seconds))
        for unit in (mine.round, mine.prompt)
    )
    sides = (Ratio(side.tokens.tolist(), side.seconds.tolist()) for side in (mine, theirs))
    standing = standings(mine.round.tolist(), mine.turns, *sides)
    return Both(ratio_interval_over_rounds(*rounds, standing=standing), bootstrap_over_prompts(*prompts))


def _rate(own: Samples, amount: Column, per: Column) -> Both:
    rounds, prompts = (_sums(unit, amount, per) for unit in (own.round, own.prompt))
    standing = standings(own.round.tolist(), own.turns, Ratio(amount.tolist(), per.tolist()))
    return Both(
        ratio_interval_over_rounds(rounds, [1.0] * len(rounds.amount), standing=standing),
        bootstrap_over_prompts(prompts, [1.0] * len(prompts.amount)),
    )


def _sums(unit: Column, amount: Column, per: Column) -> Ratio:
    """One sample for each value of `unit`."""
    _, code = np.unique(unit, return_inverse=True)
    sums = (np.bincount(code, weights=column.astype(float)) for column in (amount, per))
    return Ratio(*(each.tolist() for each in sums))


def _mean_of_peaks(own: Samples, unit: Column) -> Interval:
    """Of the mean of the units' largest peaks."""
    names, code = np.unique(unit, return_inverse=True)
    peaks = [float(own.peak_bytes[code == index].max()) for index in range(len(names))]
    ones = [1.0] * len(peaks)
    over_rounds = unit is own.round
    return ratio_interval_over_rounds(peaks, ones) if over_rounds else bootstrap_over_prompts(peaks, ones)


# --- A/A --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """A baseline against itself: the same program on the same prompts, so that every difference is noise."""

    row: Row
    speeds: tuple[float, ...]
    "tokens per second of each round"
    ratio: Interval | None
    "its odd rounds over its even ones, which should hold 1; None for fewer than four rounds"

    @property
    def spread(self) -> float:
        return max(self.speeds) / min(self.speeds) - 1

    @property
    def noise(self) -> float | None:
        """Standard deviation of the rounds' log speeds, which more rounds do not raise; None for one round."""
        return stdev(map(log, self.speeds)) if len(self.speeds) > 1 else None

    @property
    def holds(self) -> bool | None:
        """Whether the interval holds 1; it does not in one of twenty controls of a quiet machine."""
        if self.ratio is None or self.ratio.low is None or self.ratio.high is None:
            return None
        return self.ratio.low <= 1 <= self.ratio.high


def controls(rows: Sequence[Row]) -> list[Control]:
    """One for every baseline that finished a trial."""
    found = []
    for row in rows:
        if row.is_baseline and row.speed_by_round:
            speeds = tuple(row.speed_by_round[round] for round in sorted(row.speed_by_round))
            found.append(Control(row, speeds, against_itself(speeds)))
    return found


def against_itself(speeds: Sequence[float]) -> Interval | None:
    if len(speeds) < FEWEST_ROUNDS_AGAINST_ITSELF:
        return None
    odd, even = speeds[1::2], speeds[0::2]
    return change_between_rounds(odd, even, geometric_mean(odd) / geometric_mean(even))
