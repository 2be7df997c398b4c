"""Every doubt is raised by what it is about, and by nothing in a quiet run."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import factory
import msgspec
import pytest
from factory import cell, trial

from harness.doubts import doubts
from harness.metrics import summary
from harness.results import Memory, Run, Trial


def quiet(speeds: Sequence[float] = (1.0, 1.001, 0.999, 1.0), **changes: Any) -> list[Trial]:
    """`ar` and `s3d`, four trials in each round, whose speeds are given by round; nothing repeats itself."""
    return [
        trial(cell(name), committed, seconds / speed, round=index, prompt_id=f"p{number}", **changes)
        for index, speed in enumerate(speeds)
        for number in range(4)
        for name, committed, seconds in (("ar", [1] * 12, 0.1), ("s3d", [3, 3, 3, 3], 0.2))
    ]


def raised(*trials: Trial) -> list[str]:
    run: Run = factory.run(*trials)
    return doubts(run, summary(run))


def test_a_quiet_run_raises_none() -> None:
    assert raised(*quiet(warm_up_passes=2, warm_up_settled=True)) == []


def test_trials_of_two_devices() -> None:
    half = [
        msgspec.structs.replace(each, device_name="NVIDIA H200", device_uuid=f"GPU-{each.round // 2}")
        for each in quiet()
    ]
    (line,) = raised(*half)
    assert "measured on 2 devices (NVIDIA H200 GPU-0, NVIDIA H200 GPU-1)" in line
    untold = [msgspec.structs.replace(each, device_uuid=None if each.round else "GPU-0") for each in half]
    assert raised(*untold) == []


@pytest.mark.parametrize(("speeds", "word"), [((1.0, 0.97, 0.94, 0.91), "slower"), ((1.0, 1.03, 1.06, 1.1), "faster")])
def test_drift(speeds: Sequence[float], word: str) -> None:
    assert f"{word} from the first round to the last" in raised(*quiet(speeds))[0]
    assert not any("drifted" in line for line in raised(*quiet(tuple(speeds[i] for i in (1, 3, 0, 2)))))


def test_rounds_that_differ_are_too_noisy_to_rank_by() -> None:
    (line,) = raised(*quiet((1.0, 0.9, 0.98, 1.02)))
    assert "Rounds of ar vary by 6% in speed (standard deviation; they differ by up to 13%)" in line
    assert "more rounds" in line


def test_more_rounds_of_the_same_noise_are_not_noisier() -> None:
    rng = random.Random(0)
    speeds = [math.exp(rng.gauss(0, 0.015)) for _ in range(40)]
    assert max(speeds) / min(speeds) > 1.06
    assert not [line for line in raised(*quiet(speeds)) if "vary by" in line]


def test_a_baseline_that_is_not_itself() -> None:
    (line,) = raised(*quiet((1.0, 1.1, 1.001, 1.101)))
    assert "ar against itself is 1.10, surely not 1" in line


def test_uneven_steps_of_the_baseline_are_another_programs() -> None:
    steps = [0.1] * 10 + [0.2] * 2
    (line,) = raised(
        *(msgspec.structs.replace(one, round_seconds=steps) if one.cell.method == "ar" else one for one in quiet())
    )
    assert "something else uses this machine. Close other programs" in line


def test_a_slow_first_trial_and_a_warm_up_that_did_not_settle() -> None:
    slow = [
        msgspec.structs.replace(one, round_seconds=[0.12] * 12)
        if one.prompt_id == "p0" and one.cell.method == "ar"
        else one
        for one in quiet(warm_up_passes=6, warm_up_settled=False)
    ]
    first, restless = raised(*slow)
    assert "first trial of a process is slow (ar: a step takes 20% more" in first
    assert "in 8 processes steps still became faster after a warm-up of 6 short texts" in restless


def test_text_that_repeats_itself() -> None:
    (line,) = raised(*quiet(tokens=[7] * 13))
    assert "31% of the tokens of ar in 32 repeat what it wrote before" in line


def test_memory_that_nothing_accounts_for() -> None:
    """Weights and cache of 1000 MiB in all, and a loaded state that holds more."""
    for more, said in ((0, False), (10, False), (100, True), (-100, False)):
        held = Memory(
            weights_bytes=900 << 20,
            cache_bytes=100 << 20,
            load_bytes=(1000 + more) << 20,
            peak_allocated_bytes=(1050 + more) << 20,
        )
        found = raised(*quiet(memory=held))
        assert bool(found) is said
        assert all("add up in 2 of 2 rows: 100 MiB" in line and "--isolation cell" in line for line in found)


def slow_first(**changes: Any) -> list[Trial]:
    """Of one cell and round: the first trial takes three times as long a step as the others."""
    return [
        trial(
            cell("ar", bits=changes.get("bits", "32")),
            [1] * 12,
            0.3 if not number else 0.1,
            prompt_id=f"p{number}",
            round=changes.get("round", 0),
        )
        for number in range(4)
    ]


def test_a_slow_first_trial_of_one_target_is_not_lost_among_others() -> None:
    others = [
        trial(cell("ar", bits=bits), [1] * 12, 0.1, prompt_id=f"p{number}")
        for bits in ("16", "8")
        for number in range(4)
    ]
    assert any("first trial of a process is slow" in line for line in raised(*slow_first(), *others))


def test_later_rounds_of_a_shared_process_do_not_hide_its_first_trial() -> None:
    later = [
        trial(cell("ar"), [1] * 12, 0.1, prompt_id=f"p{number}", round=round) for round in (1, 2) for number in range(4)
    ]
    shared = factory.run(*slow_first(), *later, isolation="cell")
    assert any("first trial of a process is slow" in line for line in doubts(shared, summary(shared)))
