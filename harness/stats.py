"""Intervals for a ratio of sums. Pure: values in, values out.

Two questions, two intervals. "For these prompts on this machine": a fresh process is the noise unit, so Student's t
over the per-round log ratios. "For prompts like these": a bootstrap over whole prompts, which is about generality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

THESE_PROMPTS = "for these prompts on this machine"
PROMPTS_LIKE_THESE = "for prompts like these"

Array = np.ndarray[Any, np.dtype[np.float64]]
Columns = tuple[Array, Array]


@dataclass(frozen=True)
class Interval:
    """A value and what is known of it; `low` and `high` are None where there are too few samples to tell."""

    value: float
    low: float | None
    high: float | None
    kind: str

    def scaled(self, factor: float) -> Interval:
        """The interval of `factor * value`, for a positive factor that is known exactly."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return Interval(self.value * factor, low, high, self.kind)


@dataclass(frozen=True)
class Ratio:
    """Amounts and what they are per, sample by sample: `Ratio(tokens, seconds)` is a speed, of sums over sums."""

    amount: Sequence[float]
    per: Sequence[float]

    def __post_init__(self) -> None:
        assert len(self.amount) == len(self.per) > 0

    @property
    def value(self) -> float:
        return sum(self.amount) / sum(self.per)


def ratio_interval_over_rounds(
    numerator_per_round: Sequence[float] | Ratio,
    denominator_per_round: Sequence[float] | Ratio,
    confidence: float = 0.95,
    standing: Sequence[float] | None = None,
) -> Interval:
    """Ratio of sums, with a Student-t interval over the per-round log ratios; one round gives no interval.

    Either side may be a `Ratio`, one sample a round: two of them give a speed-up. All sums must be positive. The
    interval is centred, on the log scale, at the ratio of sums, so it always holds the value that it belongs to.
    `standing` is that of `standings`, where rounds may lack items.
    """
    over, under = _columns(numerator_per_round, denominator_per_round)
    value = _ratio(over, under)
    logs_R = np.log(over[0] / over[1] / (under[0] / under[1]))
    if standing is not None:
        logs_R = logs_R - np.log(np.asarray(standing, float))
    if len(logs_R) < 2:
        return Interval(value, None, None, THESE_PROMPTS)
    error = float(logs_R.std(ddof=1)) / math.sqrt(len(logs_R))
    half = _quantile(confidence, len(logs_R) - 1) * error
    return Interval(value, value * math.exp(-half), value * math.exp(half), THESE_PROMPTS)


def standings(rounds: Sequence[Any], items: Sequence[int], over: Ratio, under: Ratio | None = None) -> list[float]:
    """For each round, ascending, the ratio that a usual round has on the items that this one has, relative to all.

    1 for a round that has every item. What a round cut short says is its ratio over this: else it would be another
    figure because it is of other prompts. One entry a trial in every argument; items are numbered from 0, and a usual
    round has of each the mean over the rounds that have it.
    """
    _, round_ = np.unique(np.asarray(rounds), return_inverse=True)
    item = np.asarray(items, int)
    has_RI = np.zeros((round_.max() + 1, item.max() + 1))
    has_RI[round_, item] = 1
    if has_RI.all():
        return [1.0] * len(has_RI)
    one = np.ones(len(item))
    columns = (over.amount, over.per, *((one, one) if under is None else (under.amount, under.per)))
    usual_4I = [np.bincount(item, weights=np.asarray(each, float)) / np.bincount(item) for each in columns]
    sums_4R = [has_RI @ usual_I for usual_I in usual_4I]
    ratio_R = sums_4R[0] / sums_4R[1] / (sums_4R[2] / sums_4R[3])
    whole = [float(usual_I.sum()) for usual_I in usual_4I]
    found: list[float] = (ratio_R / (whole[0] / whole[1] / (whole[2] / whole[3]))).tolist()
    return found


@lru_cache(maxsize=1024)
def _quantile(confidence: float, degrees: float) -> float:
    """Of Student's t: how many standard errors an interval reaches to either side."""
    return float(scipy_stats.t.ppf((1 + confidence) / 2, df=degrees))


def bootstrap_over_prompts(
    numerator_per_prompt: Sequence[float] | Ratio,
    denominator_per_prompt: Sequence[float] | Ratio,
    confidence: float = 0.95,
    resamples: int = 4999,
    seed: int = 0,
) -> Interval:
    """Ratio of sums, with a percentile bootstrap that draws prompts, both sides of a prompt together.

    One sample a prompt, its turns and rounds summed. One prompt gives no interval; the same seed, the same interval.
    """
    over, under = _columns(numerator_per_prompt, denominator_per_prompt)
    value = _ratio(over, under)
    if len(over[0]) < 2:
        return Interval(value, None, None, PROMPTS_LIKE_THESE)

    drawn = _draws(len(over[0]), resamples, seed)
    ratios = (drawn @ over[0]) * (drawn @ under[1]) / ((drawn @ over[1]) * (drawn @ under[0]))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Interval(value, float(low), float(high), PROMPTS_LIKE_THESE)


@lru_cache(maxsize=16)
def _draws(prompts: int, resamples: int, seed: int) -> Array:
    """How often each prompt is drawn, one row a resample: the draws of `scipy.stats.bootstrap`, kept for the next."""
    picks = np.random.default_rng(seed).integers(0, prompts, (resamples, prompts))
    flat = (picks + prompts * np.arange(resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=resamples * prompts).reshape(resamples, prompts).astype(float)


def change_between_rounds(
    new_per_round: Sequence[float], base_per_round: Sequence[float], value: float, confidence: float = 0.95
) -> Interval:
    """`value` = new / base of two runs whose rounds do not pair: Welch's t over the log rates of the rounds.

    The interval is centred at `value` on the log scale. One round on either side gives none.
    """
    logs = [np.log(np.asarray(side, float)) for side in (new_per_round, base_per_round)]
    if min(map(len, logs)) < 2:
        return Interval(value, None, None, THESE_PROMPTS)
    errors = [float(side.var(ddof=1)) / len(side) for side in logs]
    error = sum(errors)
    if error == 0:
        return Interval(value, value, value, THESE_PROMPTS)
    degrees = error**2 / sum(own**2 / (len(side) - 1) for own, side in zip(errors, logs, strict=True))
    half = _quantile(confidence, degrees) * math.sqrt(error)
    return Interval(value, value * math.exp(-half), value * math.exp(half), THESE_PROMPTS)


def bootstrap_unpaired(
    new_per_prompt: Ratio, base_per_prompt: Ratio, confidence: float = 0.95, resamples: int = 4999, seed: int = 0
) -> Interval:
    """Ratio of two ratios of sums over different prompts, which are drawn on each side by themselves."""
    value = new_per_prompt.value / base_per_prompt.value
    if min(len(new_per_prompt.amount), len(base_per_prompt.amount)) < 2:
        return Interval(value, None, None, PROMPTS_LIKE_THESE)
    rng = np.random.default_rng(seed)

    def drawn(side: Ratio) -> Array:
        amount, per = np.asarray(side.amount, float), np.asarray(side.per, float)
        picks = rng.integers(0, len(amount), (resamples, len(amount)))
        found: Array = amount[picks].sum(1) / per[picks].sum(1)
        return found

    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn(new_per_prompt) / drawn(base_per_prompt), [tail, 100 - tail])
    return Interval(value, float(low), float(high), PROMPTS_LIKE_THESE)


def _columns(*sides: Sequence[float] | Ratio) -> tuple[Columns, Columns]:
    """Each side as (amount, per); a plain side is an amount per sample."""
    over, under = (
        (np.asarray(side.amount, float), np.asarray(side.per, float))
        if isinstance(side, Ratio)
        else (np.asarray(side, float), np.ones(len(side)))
        for side in sides
    )
    if len(over[0]) != len(under[0]) or len(over[0]) == 0:
        raise ValueError(
            f"{len(over[0])} samples against {len(under[0])}: a ratio needs the same samples on both sides"
        )
    return over, under


def _ratio(over: Columns, under: Columns) -> float:
    return float(over[0].sum() / over[1].sum() / (under[0].sum() / under[1].sum()))
