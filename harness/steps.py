"""Where a series of measurements changes its level for good. Pure; the search is PELT (Killick et al. 2012)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats as scipy_stats

from harness.stats import Array

FEWEST_RUNS = 10
FEWEST_BESIDE = 2
"runs on either side of a step"
PENALTY = 5.0
"in log(runs), for each step, in units of the noise's variance"
CHANCE = 0.01
"p-value of Welch's t between the levels, above which a step is noise"
EXACT = 1e-4
"noise of a series that has none: smaller changes than this share are no steps"


@dataclass(frozen=True)
class Step:
    """From run `at` on (an index into the series) the level is `change` times what it was."""

    at: int
    change: float


def steps(values: Sequence[float]) -> list[Step]:
    """Steps of a positive series in the order of its runs; none for fewer than FEWEST_RUNS."""
    if len(values) < FEWEST_RUNS:
        return []
    import ruptures

    logs_R = np.log(np.asarray(values, float))
    scaled_R = logs_R / max(_noise(logs_R), EXACT)
    found = ruptures.Pelt(model="l2", min_size=FEWEST_BESIDE, jump=1).fit(scaled_R)
    ends = [0, *found.predict(pen=PENALTY * math.log(len(values)))]
    levels = [logs_R[start:end] for start, end in pairwise(ends)]
    return [
        Step(at, math.exp(float(after.mean() - before.mean())))
        for at, before, after in zip(ends[1:], levels, levels[1:], strict=False)
        if _apart(before, after)
    ]


def _noise(logs_R: Array) -> float:
    """Standard deviation about the levels, from the median difference of neighbours, which steps hardly move."""
    differences = np.diff(logs_R)
    return 1.4826 * float(np.median(np.abs(differences - np.median(differences)))) / math.sqrt(2)


def _apart(before: Array, after: Array) -> bool:
    if before.std() == 0 and after.std() == 0:
        return abs(float(before.mean() - after.mean())) > EXACT
    return bool(scipy_stats.ttest_ind(before, after, equal_var=False).pvalue < CHANCE)
