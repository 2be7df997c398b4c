"""A round taken apart: its phases add up, its cost explains the speed-up, and the floor is only of what is known."""

from __future__ import annotations

from typing import Any

import bench
import factory
import msgspec
import pytest
from factory import cell, trial
from tiny import tiny

from harness import meters
from harness.decode import Limits, decode
from harness.decomposition import RoundCost, floor_share, quiet_pass_seconds, round_cost
from harness.doubts import doubts
from harness.metrics import summary
from harness.results import Roofline, Trial
from harness.target import Target

AR, S3D = cell("ar"), cell("s3d")
DEVICE = Roofline(
    device_name="card", device_uuid="GPU-1", torch="2", measured="then", buffer_bytes=1, copy_bytes_per_second=1.0,
    read_bytes_per_second=1000.0,
)  # fmt: skip


def spent(of: Any, committed: list[int], phases: dict[str, float], outside: float = 0.0, **changes: Any) -> Trial:
    """A trial whose rounds together spend so many seconds in each phase, and so many outside."""
    seconds = (sum(phases.values()) + outside) / len(committed)
    return trial(of, committed, seconds, phase_seconds=phases, **changes)


def known(cost: RoundCost | None) -> RoundCost:
    assert cost is not None
    return cost


def test_a_round_is_the_mean_over_all_rounds() -> None:
    one = spent(S3D, [3, 1], {"draft": 1.0, "verify": 2.0})
    two = spent(S3D, [2, 2, 2, 2], {"draft": 1.0, "verify": 4.0, "host": 1.0}, prompt_id="p1")
    cost = known(round_cost([one, two]))
    assert cost.phase_seconds == pytest.approx({"draft": 2 / 6, "verify": 6 / 6, "host": 1 / 6})
    assert cost.measured_seconds == pytest.approx(9 / 6)
    assert cost.unattributed_seconds == pytest.approx(0)
    assert cost.adds_up
    assert (cost.in_steps, cost.steps, cost.explained_speedup) == ({}, None, None)


@pytest.mark.parametrize(("outside", "adds_up"), [(0.02, True), (-0.02, True), (0.04, False), (-0.04, False)])
def test_three_percent_may_lie_outside_the_phases(outside: float, adds_up: bool) -> None:
    whole = spent(AR, [1], {"verify": 1.0 - outside}, outside)
    assert known(round_cost([whole])).adds_up is adds_up


def test_the_speed_up_is_tau_over_the_cost_in_baseline_steps() -> None:
    base = spent(AR, [1] * 10, {"verify": 9.0, "host": 1.0})
    own = spent(S3D, [3, 2], {"draft": 1.0, "verify": 2.0, "accept": 0.5, "commit": 0.25, "host": 0.25})
    row = {one.cell.method: one for one in summary(factory.run(base, own))}["s3d"]
    cost = known(row.round_cost)
    assert cost.steps == pytest.approx(2.0)
    assert cost.in_steps["verify"] == pytest.approx(1.0)
    assert row.tau == 2.5
    assert cost.explained_speedup == pytest.approx(1.25)
    assert cost.difference == pytest.approx(0.0)


def test_time_outside_the_phases_is_what_the_explanation_lacks() -> None:
    base = spent(AR, [1] * 10, {"verify": 10.0})
    own = spent(S3D, [2, 2], {"verify": 2.0}, outside=0.5)
    cost = known(summary(factory.run(base, own))[1].round_cost)
    assert cost.explained_speedup == pytest.approx(2.0)
    assert cost.difference == pytest.approx(2.0 / 1.6 - 1)


def test_only_trials_that_both_sides_finished_explain_a_speed_up() -> None:
    base = spent(AR, [1] * 4, {"verify": 4.0})
    own = [spent(S3D, [2, 2], {"verify": 4.0}), spent(S3D, [9], {"verify": 90.0}, prompt_id="alone")]
    row = summary(factory.run(base, *own))[1]
    assert known(row.round_cost).steps == pytest.approx(2.0)
    assert known(row.round_cost).explained_speedup == pytest.approx(1.0)
    assert known(row.round_cost).difference == pytest.approx(0.0)


def test_the_baseline_costs_one_step() -> None:
    row = summary(factory.run(spent(AR, [1, 1], {"draft": 0.1, "verify": 1.0})))[0]
    assert known(row.round_cost).steps == pytest.approx(1.0)
    assert known(row.round_cost).explained_speedup is None


def test_what_tells_no_phases_has_no_cost() -> None:
    assert round_cost([trial(AR)]) is None
    assert summary(factory.run(trial(AR), trial(S3D)))[0].round_cost is None


def test_phases_that_do_not_add_up_are_a_doubt() -> None:
    quiet = [spent(AR, [1] * 4, {"verify": 4.0}), spent(S3D, [2, 2], {"verify": 4.0})]
    loud = [quiet[0], spent(S3D, [2, 2], {"verify": 4.0}, outside=1.0)]
    said = [[line for line in doubts(run, summary(run)) if "adds up" in line] for run in map(_run, (quiet, loud))]
    assert said[0] == []
    assert len(said[1]) == 1
    assert "80% of the measured time for s3d" in said[1][0]
    assert "1 of 2 cells" in said[1][0]


def _run(trials: list[Trial]) -> Any:
    return factory.run(*trials)


# --- the floor -------------------------------------------------------------------------------------------------------


def on_card(**changes: Any) -> Trial:
    given = {"device_name": "card", "device_uuid": "GPU-1", "pass_bytes": 500} | changes
    return spent(AR, [1, 1], {"draft": 3.0, "verify": 2.0}, **given)


def test_the_share_of_the_floor_is_bytes_over_bandwidth_over_verify_time() -> None:
    """500 bytes at 1000 a second are 0.5 s, and a pass took 1 s."""
    assert floor_share([on_card()], DEVICE) == pytest.approx(0.5)
    assert floor_share([on_card(), on_card(pass_bytes=700)], DEVICE) == pytest.approx(0.6)
    run = factory.run(on_card(), roofline=DEVICE)
    assert summary(run)[0].floor_share == pytest.approx(0.5)


@pytest.mark.parametrize(
    "changes", [{"pass_bytes": None}, {"device_uuid": "GPU-2"}, {"device_name": "other"}, {"phase_seconds": None}]
)
def test_what_is_not_known_has_no_share(changes: dict[str, Any]) -> None:
    assert floor_share([msgspec.structs.replace(on_card(), **changes)], DEVICE) is None
    assert floor_share([on_card()], None) is None


# --- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ar", "prompt-lookup", "layerskip"])
def test_the_phases_of_a_real_decode_add_up(name: str) -> None:
    """Every moment between the first mark and the last is in a phase, whatever the machine is doing."""
    target = Target(tiny("llama"), capacity=bench.CAPACITY, scratch=64)
    method = bench.load(name, target, None)
    prompt = bench.text(24, 64, seed=3) * 2
    for _ in range(3):  # another program may take the core between the last mark and the stopwatch
        clock = meters.clock(target.device)
        rounds = decode(target, method, prompt, Limits(60), bench.sampler(), None, clock)
        (_, *steps), reading = meters.measure(rounds, meters.Gauges())
        committed, phases = [len(step.committed) for step in steps], clock.seconds()
        measured = trial(cell(name), committed, decode_seconds=reading.decode_seconds, phase_seconds=phases)
        if (cost := known(round_cost([measured]))).adds_up:
            break
    assert cost.adds_up
    assert set(cost.phase_seconds) == {"draft", "verify", "accept", "commit", "host"}


def test_an_undisturbed_pass_is_told_from_passes_of_its_own_kind() -> None:
    """Eight passes that draft 4 and two that draft none; one of the first kind was disturbed."""
    seconds = [0.2] * 7 + [2.0] + [0.1, 0.1]
    one = trial(cell("s3d"), [1] * 10, round_seconds=seconds, drafted=[4] * 8 + [0] * 2)
    assert quiet_pass_seconds([one]) == pytest.approx((8 * 0.2 + 2 * 0.1) / 10)
    assert quiet_pass_seconds([]) is None
