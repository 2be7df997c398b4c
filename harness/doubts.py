"""What in a run's own figures is a reason not to trust them, and what to do about it: one sentence each. Pure.

The thresholds say where a reader would draw other conclusions, not where noise becomes measurable.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from scipy import stats as scipy_stats

from harness.decomposition import ADDS_UP
from harness.intervals import controls
from harness.metrics import Row
from harness.results import BASELINE, Run, Trial

DRIFT, DRIFT_P = 0.03, 0.01
FEWEST_ROUNDS_FOR_DRIFT = 3
SLOW_FIRST = 1.10
UNEVEN_STEPS = 1.5
"p95 over p50 of the baseline's steps"
NOISY = 0.035
"standard deviation of the baseline's speed over rounds: two that differ by 5 %"
REPEATED = 0.2
FEWEST_STEPS = 20


def doubts(run: Run, rows: Sequence[Row]) -> list[str]:
    """In the order in which they matter; `rows` are the run's summary."""
    good = [trial for trial in run.rows if trial.outcome == "ok"]
    baselines = [row for row in rows if row.is_baseline]
    found = (devices(good), drift(rows), uneven(baselines), control(rows), unaccounted(rows), unattributed(rows))
    starts = good if run.manifest.isolation == "round" else _first_rounds(good)
    return [line for each in (*found, first_trials(starts), warm_up(good), repeats(baselines)) for line in each]


def _first_rounds(good: Sequence[Trial]) -> list[Trial]:
    """Of every cell, the round with which its process began, where later ones share it."""
    first: dict[str, int] = {}
    for trial in good:
        first[trial.cell.id] = min(first.get(trial.cell.id, trial.round), trial.round)
    return [trial for trial in good if trial.round == first[trial.cell.id]]


def devices(good: Sequence[Trial]) -> Iterator[str]:
    """Trials of more than one device, as where a run went on with another one."""
    seen = dict.fromkeys((trial.device_name, trial.device_uuid) for trial in good)
    named = {name for name, uuid in seen if uuid}
    seen = {one: None for one in seen if one[1] or one[0] not in named}
    if len(seen) > 1:
        names = ", ".join(f"{name} {uuid}" if uuid else f"{name}" for name, uuid in seen)
        yield (
            f"The trials were measured on {len(seen)} devices ({names}), whose speeds must not be compared: measure "
            "again on one."
        )


def drift(rows: Sequence[Row]) -> Iterator[str]:
    """A trend of the baselines' speed over rounds."""
    for control in controls(rows):
        if len(control.speeds) < FEWEST_ROUNDS_FOR_DRIFT:
            continue
        logs = [math.log(speed) for speed in control.speeds]
        trend = scipy_stats.linregress(range(len(logs)), logs)
        change = math.expm1(float(trend.slope) * (len(logs) - 1))
        if abs(change) > DRIFT and trend.pvalue < DRIFT_P:
            word = "slower" if change < 0 else "faster"
            yield (
                f"Speeds drifted: {control.row.cell.label} became {abs(change):.0%} {word} from the first round to the "
                "last. Speed-ups are paired by round and suffer little; for absolute speeds let the machine reach a "
                "steady temperature and measure again."
            )


def uneven(baselines: Sequence[Row]) -> Iterator[str]:
    """Steps of the baseline that take uneven times: it does the same work in each."""
    for row in baselines:
        took = row.round_seconds
        if took is not None and row.verify_passes >= FEWEST_STEPS and took.p95 > UNEVEN_STEPS * took.p50:
            yield (
                f"Every 20th step of {row.cell.label} took {took.p95 / took.p50:.1f} times the median or more: "
                "something else uses this machine. Close other programs, and add rounds."
            )


def control(rows: Sequence[Row]) -> Iterator[str]:
    """The baseline against itself: surely not 1, or too far apart."""
    for one in controls(rows):
        label = one.row.cell.label
        if one.holds is False and one.ratio is not None and abs(one.ratio.value - 1) > DRIFT:
            yield (
                f"{label} against itself is {one.ratio.value:.2f}, surely not 1, which chance does in one run of 20: "
                "differences of this size mean nothing here. Look for what changes between rounds."
            )
        elif one.noise is not None and one.noise > NOISY:
            yield (
                f"Rounds of {label} vary by {one.noise:.0%} in speed (standard deviation; they differ by up to "
                f"{one.spread:.0%}): close other programs, and let more rounds make up for it."
            )


def unaccounted(rows: Sequence[Row]) -> Iterator[str]:
    """Rounds whose phases do not add up to the measured time."""
    told = [(row.cell.label, row.round_cost) for row in rows if row.round_cost is not None]
    shares = [(cost.attributed_share, label) for label, cost in told if not cost.adds_up]
    if shares:
        share, label = max(shares, key=lambda each: abs(each[0] - 1))
        yield (
            f"What rounds do adds up to {share:.0%} of the measured time for {label}, and not to within {ADDS_UP:.0%} "
            f"for {len(shares)} of {len(told)} cells: do not rely on where their time went, and measure again on an "
            "idle machine."
        )


def unattributed(rows: Sequence[Row]) -> Iterator[str]:
    """Peaks that hold more than what was counted."""
    told = [(row.memory, row.cell.label) for row in rows if row.memory is not None]
    more = [(found.unattributed_bytes, label) for found, label in told if found.inflated]
    if more:
        size, label = max(more)
        yield (
            f"Memory does not add up in {len(more)} of {len(told)} rows: {size / 2**20:,.0f} MiB of {label}'s peak are "
            "neither weights, drafter, cache and graphs nor its own activations. What earlier cells of the same "
            "process left behind is among them; `--isolation cell` measures without it."
        )


def first_trials(good: Sequence[Trial]) -> Iterator[str]:
    """The first trial of a baseline's process against its others, by the median step: the work is the same in each."""
    processes: dict[tuple[str, int], list[Trial]] = {}
    for trial in good:
        if trial.cell.method == BASELINE:
            processes.setdefault((trial.cell.id, trial.round), []).append(trial)
    slow: dict[str, list[float]] = {}
    labels: dict[str, str] = {}
    for (id, _), trials in processes.items():
        steps = [statistics.median(trial.round_seconds) for trial in trials if trial.round_seconds]
        if len(steps) > 2:
            slow.setdefault(id, []).append(steps[0] / statistics.median(steps[1:]))
            labels[id] = trials[0].cell.label
    worst = max(slow, key=lambda id: statistics.median(slow[id]), default=None)
    if worst is not None and (times := statistics.median(slow[worst])) > SLOW_FIRST:
        yield (
            f"The first trial of a process is slow ({labels[worst]}: a step takes {times - 1:.0%} more than in the "
            "others): the warm-up was too short. Add prompts, so that it weighs less."
        )


def warm_up(good: Sequence[Trial]) -> Iterator[str]:
    """Processes whose steps still became faster as their first trial began."""
    restless = {(t.cell.id, t.round): t.warm_up_passes or 0 for t in good if t.warm_up_settled is False}
    if restless:
        labels = ", ".join(dict.fromkeys(t.cell.label for t in good if t.warm_up_settled is False))
        yield (
            f"{labels}: in {len(restless)} process{'es' * (len(restless) != 1)} steps still became faster after a "
            f"warm-up of {max(restless.values())} short texts: first trials may be slow. Add prompts, so that they "
            "weigh less."
        )


def repeats(baselines: Sequence[Row]) -> Iterator[str]:
    """How much of the baselines' text repeats itself."""
    for row in baselines:
        if row.repeated_share is not None and row.repeated_share > REPEATED:
            yield (
                f"{row.repeated_share:.0%} of the tokens of {row.cell.label} in {row.cell.bits} repeat what it wrote "
                "before, which flatters methods that look text up: read tau without repeats, or ask for fewer new "
                "tokens."
            )
