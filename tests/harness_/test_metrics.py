"""Derived numbers: what counts, what does not, and that a failure never borrows one."""

from __future__ import annotations

import msgspec
import pytest
from factory import MIB, cell, failed, run, trial
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.metrics import GIB, Row, first_difference, repeats, summary, trial_frame
from harness.results import Run, Trial

AR = cell("ar")
S3D = cell("s3d")


def rows(of: Run) -> dict[str, Row]:
    return {row.cell.label: row for row in summary(of)}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_tau_of_the_baseline_is_exactly_one(lengths: list[int]) -> None:
    trials = [trial(AR, [1] * length, prompt_id=f"p{index}") for index, length in enumerate(lengths)]
    row = rows(run(*trials))["ar"]
    assert row.tau == 1.0
    assert row.acceptance == ()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=4))
def test_speed_and_tau_are_ratios_of_sums(committed: list[list[int]]) -> None:
    row = rows(run(*(trial(S3D, counts, prompt_id=f"p{index}") for index, counts in enumerate(committed))))["s3d"]
    tokens, passes = sum(map(sum, committed)), sum(map(len, committed))
    assert row.tau == pytest.approx(tokens / passes)
    assert row.decode_tokens_per_second == pytest.approx(tokens / (0.1 * passes))
    assert row.end_to_end_tokens_per_second == pytest.approx(
        (tokens + len(committed)) / (0.1 * passes + 0.2 * len(committed))
    )


@pytest.mark.parametrize("outcome", ["oom", "error", "unsupported", "killed"])
def test_a_failed_trial_contributes_nothing_but_its_reason(outcome: str) -> None:
    good = [trial(AR), trial(S3D, (3, 2))]
    bad = [trial(of, (4, 4), 0.001, prompt_id="p1", outcome=outcome, reason="it broke") for of in (AR, S3D)]
    alone, beside = rows(run(*good)), rows(run(*good, *bad))
    for label in ("ar", "s3d"):
        told = msgspec.structs.replace(
            beside[label], trials_failed=0, outcomes=alone[label].outcomes, failures=alone[label].failures
        )
        assert told == alone[label]
        assert beside[label].outcomes == {"ok": 1, outcome: 1}
        assert [(each.outcome, each.reason, each.trials) for each in beside[label].failures] == [
            (outcome, "it broke", 1)
        ]


def test_a_cell_that_only_failed_has_no_number_at_all() -> None:
    row = rows(run(trial(AR), failed(S3D)))["s3d"]
    numbers = (row.decode_tokens_per_second, row.speedup, row.tau, row.peak_bytes, row.tokens_per_second_per_gib)
    assert numbers == (None,) * 5
    assert (row.trials_ok, row.trials_failed, row.verdict.kind, row.rank) == (0, 1, "no_pairs", None)


def test_a_planned_cell_without_trials_is_still_a_row() -> None:
    row = rows(run(trial(AR), cells=[AR, S3D]))["s3d"]
    assert (row.trials_ok, row.trials_failed, row.outcomes) == (0, 0, {})


def test_a_speedup_uses_only_prompts_that_both_sides_finished() -> None:
    pair = [trial(AR, [1] * 6, 0.1), trial(S3D, [3, 3], 0.1)]
    baseline_alone = trial(AR, [1] * 6, 99.0, prompt_id="p1")
    method_alone = trial(S3D, [3, 3], 0.0001, prompt_id="p2")
    row = rows(run(*pair, baseline_alone, failed(S3D, prompt_id="p1"), method_alone, failed(AR, prompt_id="p2")))["s3d"]
    assert row.pairs == 1
    assert row.speedup is not None
    assert row.speedup.value == pytest.approx(3.0)


def test_a_speedup_is_a_ratio_of_sums() -> None:
    trials = [
        *(trial(AR, [1] * 60, 0.1, prompt_id="long"), trial(S3D, [3] * 20, 0.1, prompt_id="long")),
        *(trial(AR, [1] * 6, 0.1, prompt_id="short"), trial(S3D, [1] * 6, 0.2, prompt_id="short")),
    ]
    row = rows(run(*trials))["s3d"]
    assert row.speedup is not None
    assert row.speedup_prompts is not None
    assert row.speedup.value == pytest.approx(6.6 / (2.0 + 1.2))
    assert row.speedup_prompts.value == pytest.approx(row.speedup.value)
    assert [each.speedup.value for each in row.speedup_by_category] == pytest.approx([6.6 / 3.2])


def test_turns_and_rounds_pair_with_themselves() -> None:
    trials = [
        trial(of, [1] * 4, seconds * (1 + turn) * (1 + index), turn=turn, round=index)
        for of, seconds in ((AR, 0.2), (S3D, 0.1))
        for turn in (0, 1)
        for index in (0, 1)
    ]
    row = rows(run(*trials))["s3d"]
    assert row.pairs == 4
    assert row.speedup is not None
    assert (row.speedup.value, row.speedup.low, row.speedup.high) == pytest.approx((2, 2, 2))
    assert sorted(row.speed_by_round) == [0, 1]


def test_a_baseline_is_never_borrowed_from_other_bits_or_runtimes() -> None:
    others = [cell("ar", bits="16"), cell("ar", runtime="graph"), cell("ar", weights="merged")]
    row = rows(run(*map(trial, others), trial(S3D)))["s3d"]
    assert (row.baseline, row.speedup, row.verdict.kind) == (None, None, "no_pairs")


def test_clipped_overshoot_is_not_counted() -> None:
    """The verdict accepted three and a bonus; only two tokens fitted under the limit."""
    clipped = trial(S3D, [4, 2], accepted=[3, 3], max_new_tokens=7)
    row = rows(run(clipped))["s3d"]
    assert (row.new_tokens, row.decode_tokens) == (7, 6)
    assert row.tau == 3.0
    assert row.acceptance[2].accepted == 2, "acceptance is of what was drafted, before clipping"


def test_acceptance_is_conditional_on_the_depth_above_and_on_being_drafted() -> None:
    told = trial(S3D, [1, 2, 3, 2], drafted_depth=[2, 2, 2, 1], accepted=[0, 1, 2, 1])
    first, second = rows(run(told))["s3d"].acceptance
    assert (first.drafted, first.reached, first.accepted, first.probability) == (4, 4, 3, 0.75)
    assert (second.drafted, second.reached, second.accepted, second.probability) == (3, 2, 1, 0.5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20))
def test_acceptance_multiplies_to_the_mean_accepted_where_every_depth_is_always_drafted(
    pairs: list[tuple[int, int]],
) -> None:
    accepted = [max(pair) for pair in pairs]
    told = trial(S3D, [count + 1 for count in accepted], accepted=accepted, depth=6)
    expected, product = 0.0, 1.0
    for depth in rows(run(told))["s3d"].acceptance:
        product *= depth.probability or 0.0
        expected += product
    assert expected == pytest.approx(sum(accepted) / len(accepted))


def test_prompt_means_weigh_prompts_and_headlines_weigh_tokens() -> None:
    row = rows(run(trial(S3D, [4] * 9, prompt_id="a"), trial(S3D, [1], prompt_id="b")))["s3d"]
    assert row.tau == pytest.approx(37 / 10)
    assert row.tau_prompt_mean == pytest.approx((4 + 1) / 2)


@pytest.mark.parametrize(
    ("device", "kind", "factor"), [("cuda", "peak_allocated_bytes", 1), ("cpu", "peak_rss_bytes", 4)]
)
def test_peak_memory_is_the_largest_of_the_field_that_counts_on_the_device(device: str, kind: str, factor: int) -> None:
    of = cell("ar", device=device)
    row = rows(run(trial(of, peak_bytes=MIB), trial(of, peak_bytes=GIB // 2, prompt_id="p1")))["ar"]
    assert (row.peak_kind, row.peak_bytes) == (kind, factor * GIB // 2)
    assert row.tokens_per_second_per_gib == pytest.approx(10 / (factor / 2))


def test_per_gib_relative_and_marginal() -> None:
    more = run(trial(AR, [1] * 4, 0.1, peak_bytes=GIB), trial(S3D, [2, 2], 0.1, peak_bytes=GIB * 5 // 4))
    row = rows(more)["s3d"]
    assert row.per_gib_relative is not None
    assert row.per_gib_relative.value == pytest.approx(2 / 1.25)
    assert row.marginal_tokens_per_second_per_gib == pytest.approx(10 / 0.25)
    same = rows(run(trial(AR, [1] * 4, 0.1), trial(S3D, [2, 2], 0.1)))["s3d"]
    assert same.marginal_tokens_per_second_per_gib is None
    noise = run(trial(AR, [1] * 4, peak_bytes=GIB), trial(S3D, [2, 2], peak_bytes=GIB + 4096))
    assert rows(noise)["s3d"].marginal_tokens_per_second_per_gib is None


def test_an_absent_memory_field_is_absent_not_zero() -> None:
    row = rows(run(trial(AR, memory=None)))["ar"]
    assert (row.peak_bytes, row.tokens_per_second_per_gib) == (None, None)


def verdict_of(bits: str, tokens: list[int], **changes: object) -> tuple[str, int, int | None]:
    on = {"bits": bits}
    told = [trial(cell("ar", **on), [1] * 3), trial(cell("s3d", **on), [2, 1], tokens=tokens, **changes)]
    verdict = rows(run(*told, temperature=changes.get("temperature", 0.0)))["s3d"].verdict
    return verdict.kind, verdict.differing, verdict.first_position


def test_verdicts() -> None:
    assert verdict_of("32", [0, 1, 2, 3]) == ("identical", 0, None)
    assert verdict_of("32", [0, 1, 9, 3]) == ("differs", 1, 2)
    assert verdict_of("16", [0, 1, 9, 3]) == ("near_tie_not_excluded", 1, 2)
    assert verdict_of("nf4", [0, 9, 9, 3]) == ("near_tie_not_excluded", 1, 1)
    assert verdict_of("int8:t6", [0, 1, 9, 3]) == ("not_testable", 1, 2)
    assert verdict_of("32", [0, 1, 9, 3], lossless=False) == ("lossy_by_design", 1, 2)
    assert verdict_of("32", [0, 1, 9, 3], temperature=0.8) == ("sampled", 1, 2)


def test_the_baseline_is_set_against_its_own_first_round() -> None:
    row = rows(run(trial(AR), trial(AR, tokens=[0, 1, 2, 9], round=1)))["ar"]
    assert (row.verdict.kind, row.verdict.answers, row.verdict.differing) == ("reference", 1, 1)


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_the_first_difference_is_symmetric_and_none_only_for_equal_texts(one: list[int], two: list[int]) -> None:
    at = first_difference(one, two)
    assert at == first_difference(two, one)
    assert (at is None) == (one == two)
    assert at is None or one[:at] == two[:at]


def test_a_repeat_is_the_end_of_a_nine_gram_seen_before() -> None:
    text = [*range(9), *range(9)]
    assert repeats(text) == [False] * 17 + [True]
    assert repeats([7] * 12) == [False] * 9 + [True] * 3
    assert repeats([1, 2]) == [False, False]


def test_tau_without_repeats_leaves_out_passes_that_continue_a_repeat() -> None:
    told = trial(S3D, [1] * 11 + [4], tokens=[7] * 16)
    row = rows(run(told))["s3d"]
    assert row.repeated_share == pytest.approx(7 / 16)
    assert row.tau == pytest.approx(15 / 12)
    assert row.tau_without_repeats == 1.0


def ranked(*labels_and_seconds: tuple[str, list[float]]) -> dict[str, str]:
    def side(label: str, seconds: list[float]) -> list[Trial]:
        return [trial(cell(label), [1] * 4, each, round=index) for index, each in enumerate(seconds)]

    trials = [one for label, seconds in labels_and_seconds for one in side(label, seconds)]
    return {label: row.places for label, row in rows(run(*trials)).items()}


def test_overlapping_intervals_share_a_rank() -> None:
    steady = [0.1, 0.1001, 0.0999]
    ranks = ranked(
        *(("ar", steady), ("fast", [s / 2 for s in steady]), ("slow", [s * 2 for s in steady])),
        ("fast-too", [0.049, 0.051, 0.050]),
    )
    assert ranks == {"fast": "1-2", "fast-too": "1-2", "ar": "3", "slow": "4"}


def test_one_round_ranks_nothing() -> None:
    assert ranked(("ar", [0.1]), ("s3d", [0.05]))["s3d"] == ""


def test_a_trial_measured_twice_counts_once_as_its_last_line_says() -> None:
    frame = trial_frame(run(trial(AR, [1] * 3), trial(AR, [1] * 5)))
    assert frame.decode_tokens.tolist() == [5]


def test_the_frame_of_no_trials_has_its_columns() -> None:
    frame = trial_frame(run(cells=[AR], rounds=1))
    assert frame.empty
    assert {"tau", "decode_tokens_per_second", "peak_bytes"} <= set(frame.columns)


def test_host_syncs_energy_and_percentiles() -> None:
    told = trial(S3D, [2] * 10, host_syncs=20, energy_joules=42.0, round_seconds=[0.1] * 9 + [1.1])
    row = rows(run(told))["s3d"]
    assert row.host_syncs_per_pass == 2.0
    assert row.joules_per_token == pytest.approx(2.0)
    assert row.round_seconds is not None
    assert row.round_seconds.p50 == pytest.approx(0.1)
    assert row.round_seconds.p99 == pytest.approx(1.01)


def test_rows_are_plain_data() -> None:
    assert msgspec.json.decode(msgspec.json.encode(summary(run(trial(AR), trial(S3D)))))[1]["cell"]["method"] == "s3d"


@pytest.mark.parametrize(
    ("depths", "tau", "chance"),
    [([0, 10], 2.0, 0.671), ([2] * 4 + [3] * 6, 3.7, None), ([0] * 8 + [2] * 2, 1.2, 0.618), ([4] * 5, 1.0, 0.0)],
)
def test_the_chance_that_breaks_even_is_that_of_the_depths_that_were_drafted(
    depths: list[int], tau: float, chance: float | None
) -> None:
    """A pass that drafts nothing gives nothing, and no two depths give what their mean gives."""
    passes = len(depths)
    method = trial(cell("s3d"), [1] * passes, 0.1 * tau, drafted=depths, drafted_depth=depths)
    found = rows(run(trial(cell("ar"), [1] * passes, 0.1), method))["s3d"]
    assert found.break_even_tau == pytest.approx(tau)
    if chance is None:
        assert found.break_even_chance is None
    else:
        assert found.break_even_chance == pytest.approx(chance, abs=1e-3)


def test_running_out_of_memory_on_long_prompts_is_no_gain_in_memory() -> None:
    """Peaks are set against each other over the trials that both sides finished."""
    base = [trial(cell(), prompt_id=name, peak_bytes=size * GIB) for name, size in (("short", 1), ("long", 4))]
    method = trial(cell("s3d"), [2, 2, 2], 0.1, prompt_id="short", peak_bytes=3 * GIB // 2)
    found = rows(run(*base, method, failed(cell("s3d"), prompt_id="long")))["s3d"]
    assert found.speedup is not None
    assert found.speedup.value == pytest.approx(2)
    assert found.per_gib_relative is not None
    assert found.per_gib_relative.value == pytest.approx(2 / 1.5)
    assert found.marginal_tokens_per_second_per_gib == pytest.approx((20 - 10) / 0.5)


def cut_short(pace: float = 1.0) -> list[Trial]:
    """Ten prompts of two kinds in two whole rounds without noise, and one prompt of a third."""
    return [
        trial(
            cell(name), [1] * 8 if name == "ar" else [tokens] * (8 // tokens), seconds, round=round, prompt_id=f"p{i}"
        )
        for round in range(3)
        for i in range(10 if round < 2 else 1)
        for tokens in (4 if i < 2 else 2,)
        for name, seconds in (("ar", 0.1), ("s3d", 0.12 * pace))
    ]


def test_a_round_cut_short_says_nothing_of_prompts_it_has_not() -> None:
    """Its one prompt gains more than the others do, in every round alike."""
    found = rows(run(*cut_short()))
    speedup = found["s3d"].speedup
    assert speedup is not None
    assert (speedup.low, speedup.high) == (pytest.approx(speedup.value), pytest.approx(speedup.value))
    speeds = list(found["s3d"].speed_by_round.values())
    assert max(speeds) == pytest.approx(min(speeds))
