"""Both 95 % intervals of every figure that a reader may rank by, over all prompts and in each category. Pure.

"For these prompts on this machine" is over rounds, each a fresh process; "for prompts like these" is over prompts. A
greedy method's tau is the same in every round, so its first interval has no width: only other prompts can change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import pandas as pd

from harness.metrics import GIB, Row, pairs_of, sides_by, trial_frame
from harness.results import BASELINE, Cell, Run
from harness.stats import Interval, Ratio, bootstrap_over_prompts, change_between_rounds, ratio_interval_over_rounds

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
    return {id: dict(_by_category(good[good.cell == id], good[good.cell == _baseline(id, cells)])) for id in cells}


def _baseline(id: str, cells: dict[str, Cell]) -> str:
    """Id of the baseline of another cell; nothing for a baseline."""
    found = (other.id for other in cells.values() if other.method == BASELINE and other.target == cells[id].target)
    return "" if cells[id].method == BASELINE else next(found, "")


def _by_category(own: pd.DataFrame, base: pd.DataFrame) -> Iterator[tuple[str, Figures]]:
    if own.empty:
        return
    yield ALL, figures(own, base)
    for category, part in own.groupby("category", sort=False):
        yield str(category), figures(part, base)


def figures(own: pd.DataFrame, base: pd.DataFrame) -> Figures:
    """Of one cell's good trials; those against the baseline over the trials that both finished."""
    found = {
        "speed": _rate(own, "decode_tokens", "decode_seconds"),
        "tau": _rate(own, "decode_tokens", "verify_passes"),
    }
    if own.peak_bytes.notna().all():
        found["peak_bytes"] = Both(
            _alone(own.groupby("round").peak_bytes.max().tolist(), over_rounds=True),
            _alone(own.groupby("prompt_id").peak_bytes.max().tolist(), over_rounds=False),
        )
        found["per_gib"] = _rate(_held(own), "decode_tokens", "decode_seconds")
    pairs = pairs_of(own, base)
    if not pairs.empty:
        found["speedup"] = _against(own, base)
        if {own.peak_bytes.notna().all(), base.peak_bytes.notna().all()} == {True}:
            found["per_gib_relative"] = _against(_held(own), _held(base))
    return found


def _held(frame: pd.DataFrame) -> pd.DataFrame:
    """Seconds times the peak of their round in GiB: tokens over these are a speed per GiB."""
    peaks = frame.groupby("round").peak_bytes.transform("max")
    return frame.assign(decode_seconds=frame.decode_seconds * peaks / GIB)


def _against(own: pd.DataFrame, base: pd.DataFrame) -> Both:
    pairs = pairs_of(own, base)
    return Both(
        ratio_interval_over_rounds(*sides_by(pairs, "round")), bootstrap_over_prompts(*sides_by(pairs, "prompt_id"))
    )


def _rate(frame: pd.DataFrame, amount: str, per: str) -> Both:
    sides = []
    for unit in ("round", "prompt_id"):
        sums = frame.groupby(unit)[[amount, per]].sum()
        sides.append(Ratio(sums[amount].tolist(), sums[per].tolist()))
    rounds, prompts = sides
    return Both(
        ratio_interval_over_rounds(rounds, [1.0] * len(rounds.amount)),
        bootstrap_over_prompts(prompts, [1.0] * len(prompts.amount)),
    )


def _alone(values: Sequence[float], *, over_rounds: bool) -> Interval:
    """Of the mean of some values."""
    ones = [1.0] * len(values)
    return ratio_interval_over_rounds(values, ones) if over_rounds else bootstrap_over_prompts(values, ones)


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
