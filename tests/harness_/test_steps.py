"""Steps are found where they are, and rarely where none is."""

from __future__ import annotations

import numpy as np
import pytest

from harness.steps import FEWEST_RUNS, Step, steps


def noisy(seed: int, runs: int, change: float = 0.0, at: int = 0) -> list[float]:
    """Noise of 1 %, and from run `at` on a level that is `change` higher."""
    rng = np.random.default_rng(seed)
    return (2.0 * np.exp(rng.normal(0, 0.01, runs)) * (1 + change * (np.arange(runs) >= at))).tolist()


@pytest.mark.parametrize("runs", [FEWEST_RUNS, 20, 50])
def test_noise_alone_rarely_has_a_step(runs: int) -> None:
    """In 200 seeded series; 3 % are expected at 20 runs."""
    assert sum(bool(steps(noisy(seed, runs))) for seed in range(200)) <= 14


@pytest.mark.parametrize("runs", [20, 50])
def test_a_change_of_5_percent_is_marked_where_it_is(runs: int) -> None:
    found = [steps(noisy(seed, runs, 0.05, runs // 2)) for seed in range(100)]
    right = [one for one in found if len(one) == 1 and abs(one[0].at - runs // 2) <= 1]
    assert len(right) >= 90
    assert np.median([one[0].change for one in right]) == pytest.approx(1.05, abs=0.005)


def test_an_exact_series_steps_where_it_changes_at_all() -> None:
    assert steps([1.85] * 8 + [1.80] * 5) == [Step(8, pytest.approx(1.80 / 1.85))]
    assert steps([1.85] * 20) == []


def test_fewer_than_ten_runs_have_no_steps() -> None:
    assert steps([1.0] * 5 + [2.0] * 4) == []
