"""Both intervals of every figure, the control, and that what is promised holds in simulated runs."""

from __future__ import annotations

import factory
import numpy as np
import pytest
from factory import MIB, cell, trial

from harness.intervals import ALL, against_itself, controls, of_run
from harness.metrics import pairs_of, sides_by, summary, trial_frame
from harness.results import Run
from harness.stats import PROMPTS_LIKE_THESE, THESE_PROMPTS, ratio_interval_over_rounds

TRUTH = 1.7


def simulated(seed: int, rounds: int = 5, prompts: int = 8, process_noise: float = 0.02) -> Run:
    """A method TRUTH times as fast as `ar`. Each process has a speed of its own, and each step noise of 5 %."""
    rng = np.random.default_rng(seed)
    trials = []
    for round in range(rounds):
        for name, committed, seconds in (("ar", [1] * 12, 0.1), ("s3d", [3, 1, 2, 2, 1, 3], 0.2 / TRUTH)):
            process = np.exp(rng.normal(0, process_noise))
            for number in range(prompts):
                steps = seconds * process * np.exp(rng.normal(0, 0.05, len(committed)))
                trials.append(
                    trial(
                        cell(name),
                        committed,
                        float(steps.mean()),
                        round=round,
                        prompt_id=f"p{number}",
                        category=("writing", "code")[number % 2],
                        peak_bytes=int(512 * MIB * np.exp(rng.normal(0, 0.001))),
                    )
                )
    return factory.run(*trials)


def test_the_round_interval_misses_the_truth_in_at_most_8_percent_of_200_simulated_run_sets() -> None:
    """Five rounds, process noise of 2 %, seeded; 5 % are expected, and 8 % is 2 standard errors above that."""
    missed = 0
    for seed in range(200):
        frame = trial_frame(simulated(seed))
        pairs = pairs_of(frame[frame.method == "s3d"], frame[frame.method == "ar"])
        interval = ratio_interval_over_rounds(*sides_by(pairs, "round"))
        assert interval.low is not None
        assert interval.high is not None
        missed += not interval.low <= TRUTH <= interval.high
    assert 2 <= missed <= 16, "nor is it so wide that it never misses"


def test_every_figure_has_both_intervals_overall_and_in_every_category() -> None:
    found = of_run(simulated(0))
    for id, expected in (
        ("ar-32-float32-base-eager-cuda", {"speed", "tau", "peak_bytes", "per_gib"}),
        ("s3d-32-float32-base-eager-cuda", {"speed", "tau", "peak_bytes", "per_gib", "speedup", "per_gib_relative"}),
    ):
        assert list(found[id]) == [ALL, "writing", "code"]
        for figures in found[id].values():
            assert set(figures) == expected
            for both in figures.values():
                assert (both.rounds.kind, both.prompts.kind) == (THESE_PROMPTS, PROMPTS_LIKE_THESE)
                for interval in (both.rounds, both.prompts):
                    assert interval.low is not None
                    assert interval.high is not None
                    assert interval.low <= interval.value * (1 + 1e-9)
                    assert interval.value <= interval.high * (1 + 1e-9)


def test_figures_agree_with_the_summary() -> None:
    run = simulated(1)
    figures = of_run(run)["s3d-32-float32-base-eager-cuda"][ALL]
    (row,) = [row for row in summary(run) if row.cell.method == "s3d"]
    for interval, both in ((row.speedup, figures["speedup"].rounds), (row.speedup_prompts, figures["speedup"].prompts)):
        assert interval is not None
        assert (interval.value, interval.low, interval.high) == pytest.approx((both.value, both.low, both.high))
    assert figures["speed"].rounds.value == pytest.approx(row.decode_tokens_per_second)
    assert figures["tau"].rounds.value == figures["tau"].rounds.low == figures["tau"].rounds.high == row.tau
    assert figures["per_gib"].rounds.value == pytest.approx(row.tokens_per_second_per_gib, rel=0.01)
    assert row.per_gib_relative is not None
    assert figures["per_gib_relative"].rounds.value == pytest.approx(row.per_gib_relative.value, rel=0.01)


def test_one_round_and_no_memory_leave_out_what_they_cannot_tell() -> None:
    one = factory.run(trial(cell("ar"), memory=None), trial(cell("s3d"), [2, 1]))
    found = of_run(one)
    assert set(found["ar-32-float32-base-eager-cuda"][ALL]) == {"speed", "tau"}
    figures = found["s3d-32-float32-base-eager-cuda"][ALL]
    assert "per_gib_relative" not in figures
    assert figures["speedup"].rounds.low is None


def test_the_control_holds_one_in_nineteen_of_twenty_quiet_runs() -> None:
    """Odd rounds against even ones of the same thing, 2,000 times; 95 % within 3 standard errors, seeded."""
    rng = np.random.default_rng(0)
    held = 0
    for speeds in np.exp(rng.normal(3, 0.02, (2000, 6))):
        interval = against_itself(speeds.tolist())
        assert interval is not None
        assert interval.low is not None
        assert interval.high is not None
        held += interval.low <= 1 <= interval.high
    assert 0.935 <= held / 2000 <= 0.975


def test_a_baseline_whose_rounds_come_in_two_kinds_is_not_itself() -> None:
    trials = [trial(cell("ar"), [1] * 4, 0.1 + 0.02 * (index % 2) + 1e-4 * index, round=index) for index in range(6)]
    (control,) = controls(summary(factory.run(*trials)))
    assert control.holds is False
    assert control.ratio is not None
    assert control.ratio.value == pytest.approx(1 / 1.2, rel=0.01)
    (short,) = controls(summary(factory.run(*trials[:3])))
    assert (short.ratio, short.holds) == (None, None)


def test_a_category_is_set_against_the_baseline_on_its_own_prompts() -> None:
    trials = [
        trial(cell(name), [committed] * 4, 0.1, prompt_id=kind, category=kind, round=round, peak_bytes=size * 2**30)
        for round in range(2)
        for kind, size in (("short", 1), ("long", 4))
        for name, committed in (("ar", 1), ("s3d", 2))
    ]
    found = of_run(factory.run(*trials))["s3d-32-float32-base-eager-cuda"]
    for category in (ALL, "short", "long"):
        assert found[category]["per_gib_relative"].rounds.value == pytest.approx(2)


def test_a_round_cut_short_does_not_widen_what_the_whole_ones_say() -> None:
    trials = [
        trial(cell(name), [tokens if name == "s3d" else 1] * 4, 0.1, prompt_id=f"p{tokens}", round=round)
        for round, kinds in enumerate(((2, 4), (2, 4), (4,)))
        for tokens in kinds
        for name in ("ar", "s3d")
    ]
    found = of_run(factory.run(*trials))["s3d-32-float32-base-eager-cuda"][ALL]
    for name in ("speed", "speedup", "per_gib", "per_gib_relative"):
        rounds = found[name].rounds
        assert (rounds.low, rounds.high) == (pytest.approx(rounds.value), pytest.approx(rounds.value)), name
