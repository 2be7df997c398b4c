"""`compare`: what may be compared, what counts as a difference, and what the exit status says. All runs are made up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import factory
import msgspec
import pytest
from factory import GIB_BYTES, cell, failed, trial

from harness.cli import main
from harness.compare import Comparison, compare, gather
from harness.errors import UserError
from harness.gates import DEFAULT_GATES, parse_gate
from harness.likeness import unlike
from harness.results import Run, Trial, append_trial, write_manifest

HOST = {"cpu": "Some CPU", "threads": 2, "torch_threads": 2, "instruction_sets": "avx2", "devices": []}
NOISE = (0.0, 0.01, -0.01)
SHORT = {
    "committed": [1] * 9,
    "drafted": [4] * 9,
    "drafted_depth": [4] * 9,
    "accepted": [0] * 9,
    "round_seconds": [0.1] * 9,
}


def measured(
    *,
    speedup: float = 2.0,
    passes: Sequence[int] = (3, 3, 3),
    peak: float = 1.0,
    noise: Sequence[float] = NOISE,
    tokens: dict[str, list[int]] | None = None,
    synthetic: bool = False,
    bits: str = "32",
    lossless: bool = True,
    **manifest: Any,
) -> Run:
    """`ar` and `s3d` on four prompts, a round for each entry of `noise`; nothing in it was measured."""
    trials: list[Trial] = []
    count = sum(passes)
    for index, shift in enumerate(noise):
        for number in range(4):
            told: dict[str, Any] = {"round": index, "prompt_id": f"p{number}", "synthetic": synthetic}
            own = (tokens or {}).get(f"p{number}")
            seconds = 0.1 * count / len(passes) / (speedup * (1 + shift))
            trials.append(trial(cell("ar", bits=bits), [1] * count, 0.1, peak_bytes=GIB_BYTES, **told))
            trials.append(
                trial(
                    cell("s3d", bits=bits),
                    passes,
                    seconds,
                    tokens=own,
                    peak_bytes=int(peak * GIB_BYTES),
                    lossless=lossless,
                    **told,
                )
            )
    facts = {"host": HOST, "versions": {"torch": "2"}, "weights_sha256": "1" * 64}
    return factory.run(*trials, **facts | manifest)


def held_against(base: Run, new: Run, *gates: str) -> Comparison:
    wanted = [parse_gate(text) for text in gates or DEFAULT_GATES]
    return compare(gather("base", [base]), gather("new", [new]), wanted)


def statuses(found: Comparison, gate: str) -> set[str]:
    return {one.status for one in found.judgements if one.gate == gate and one.cell.startswith("s3d")}


def test_the_same_results_are_the_same() -> None:
    found = held_against(measured(), measured())
    assert found.exit_status == 0
    assert found.unlike == ()
    assert {one.status for one in found.judgements} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ({"speedup": 1.8}, "speedup<-5%"),
        ({"passes": (3, 3, 2, 1)}, "tau<-1%"),
        ({"peak": 1.03}, "peak_bytes>+2%"),
        ({"tokens": {"p2": [0, 1, 2, 7, 4, 5, 6, 7, 8, 9]}}, "output"),
        ({"tokens": {"p2": [0, 1, 2, 7, 4, 5, 6, 7, 8, 9]}}, "lossless"),
    ],
)
def test_what_got_worse_is_found_by_its_gate(changes: dict[str, Any], gate: str) -> None:
    found = held_against(measured(), measured(**changes))
    assert found.exit_status == 1
    assert statuses(found, gate) == {"regressed"}


def test_what_got_better_is_no_regression() -> None:
    better = measured(speedup=3.0, passes=(5, 4), peak=0.9)
    assert held_against(measured(), better).exit_status == 0


def test_a_difference_counts_only_if_its_interval_clears_the_threshold() -> None:
    wild = (0.2, -0.2, 0.0)
    noisy = held_against(measured(noise=wild), measured(speedup=1.8, noise=wild), "speedup<-5%")
    assert noisy.exit_status == 0
    (told,) = [one.reason for one in noisy.judgements if one.cell.startswith("s3d")]
    assert "too uncertain to count" in told
    steady = held_against(measured(), measured(speedup=1.8), "speedup<-15%")
    assert steady.exit_status == 0, "surely slower, but not by so much"


def disturbed(run: Run, share: float) -> Run:
    """Each round of `s3d` with another share of its passes ten times as long."""
    rng = random.Random(0)
    rows = []
    for one in run.rows:
        took = [each * (10 if rng.random() < share * one.round else 1) for each in one.round_seconds or ()]
        other = msgspec.structs.replace(one, round_seconds=took, decode_seconds=sum(took))
        rows.append(other if one.cell.method == "s3d" else one)
    return replace(run, rows=tuple(rows))


def test_what_disturbs_a_few_passes_hides_a_slow_down_from_the_speed_and_not_from_the_cost_of_a_pass() -> None:
    passes = [3] * 40
    base, slow = (disturbed(measured(speedup=speed, passes=passes), 0.02) for speed in (2.0, 1.9))
    found = held_against(base, slow, "speedup<0%", "pass_cost>0%")
    assert statuses(found, "speedup<0%") == {"ok"}
    assert statuses(found, "pass_cost>0%") == {"regressed"}
    assert found.cells[1].changes["pass_cost"].base == pytest.approx(1.5, rel=0.01), "3 tokens a pass, twice as fast"
    assert statuses(held_against(base, base, "pass_cost>0%"), "pass_cost>0%") == {"ok"}


def test_a_lost_row_changes_no_tau() -> None:
    """One prompt takes other passes than the others, and one of its rounds is missing on one side."""
    base = measured()
    told = [
        msgspec.structs.replace(one, **SHORT) if one.prompt_id == "p3" and one.cell.method == "s3d" else one
        for one in base.rows
    ]
    lost = [one for one in told if (one.prompt_id, one.round, one.cell.method) != ("p3", 1, "s3d")]
    found = held_against(replace(base, rows=tuple(told)), replace(base, rows=tuple(lost)), "tau<-1%")
    change = next(cell for cell in found.cells if cell.label == "s3d").changes["tau"]
    assert change.base == change.new == pytest.approx((3 * 9 + 9) / (3 * 3 + 9))


def test_runs_that_shared_a_process_are_not_like_others() -> None:
    found = held_against(measured(), measured(isolation="run"))
    assert any("isolation" in line for line in found.unlike)
    assert held_against(measured(), measured(isolation="cell")).unlike == ()


def test_one_round_has_no_interval_and_judges_no_speed() -> None:
    found = held_against(measured(noise=(0.0,)), measured(noise=(0.0,), speedup=1.0), "speedup<-5%", "tau<-1%")
    assert statuses(found, "speedup<-5%") == {"not judged"}
    assert statuses(found, "tau<-1%") == {"ok"}


def test_tau_is_exact_on_one_fingerprint_and_as_sure_as_the_prompts_elsewhere() -> None:
    worse = {"passes": (3, 3, 2, 1)}
    here = held_against(measured(), measured(**worse), "tau<-1%").cells[1].changes["tau"].change
    assert here is not None
    assert here.low == here.high == here.value == pytest.approx(0.75)
    host = HOST | {"instruction_sets": "avx512f"}
    there = held_against(measured(), measured(host=host, **worse), "tau<-1%").cells[1].changes["tau"].change
    assert there is not None
    assert there.kind == "for prompts like these"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"host": HOST | {"cpu": "Another CPU"}}, "the hosts differ: cpu Some CPU and Another CPU"),
        ({"model": "other"}, "the models or settings differ: model toy and other"),
        ({"max_new_tokens": 64}, "max_new_tokens 128 and 64"),
        ({"prompt_set_sha256": "f" * 64}, "the prompts differ: prompts 000000000000 and ffffffffffff"),
        ({"schema": 0}, "the schemas differ"),
        ({"acceptance": "0.7"}, "the models or settings differ: acceptance unknown and 0.7"),
        ({"host": {}}, "NEW has no manifest.json beside its trials"),
    ],
)
def test_unlike_results_are_compared_in_ratios_and_what_is_deterministic_only(
    changes: dict[str, Any], reason: str
) -> None:
    """Each refusal says why; the speed-up and tau are judged all the same."""
    worse = measured(speedup=1.5, passes=(3, 3, 2, 1), peak=2.0, **changes)
    found = held_against(measured(), worse)
    assert reason in "; ".join(found.unlike)
    own = found.cells[1].changes
    for metric in ("speed", "peak_bytes", "first_token_seconds"):
        assert own[metric].change is None
        assert own[metric].reason == found.unlike[0]
    for metric in ("speedup", "tau", "per_gib"):
        assert own[metric].change is not None
    assert statuses(found, "peak_bytes>+2%") == {"not judged"}
    assert statuses(found, "speedup<-5%") == statuses(found, "tau<-1%") == {"regressed"}
    assert found.exit_status == 1


def test_synthetic_results_are_compared_among_themselves_only() -> None:
    with pytest.raises(UserError, match="never put together"):
        held_against(measured(), measured(synthetic=True))
    found = held_against(measured(synthetic=True), measured(synthetic=True))
    assert any(note.startswith("SYNTHETIC") for note in found.notes)
    assert not any("SYNTHETIC" in note for note in held_against(measured(), measured()).notes)


def test_texts_are_held_equal_only_on_one_fingerprint() -> None:
    parted = {"tokens": {"p2": [0, 1, 2, 7, 4, 5, 6, 7, 8, 9]}}
    for changes in ({"versions": {"torch": "3"}}, {"host": HOST | {"torch_threads": 1}}, {"temperature": 0.7}):
        found = held_against(measured(), measured(**parted, **changes), "output", "tau<-1%")
        assert statuses(found, "output") == {"not judged"}, changes


def test_the_place_where_texts_part_is_named() -> None:
    found = held_against(measured(), measured(tokens={"p2": [0, 1, 2, 7, 4, 5, 6, 7, 8, 9]}), "output")
    (told,) = found.regressed
    assert told.reason == "1 of 4 answers differ, first in p2 turn 1 at token 4"


@pytest.mark.parametrize(
    ("changes", "status"), [({"bits": "int8:t6"}, "not judged"), ({"lossless": False}, "not judged")]
)
def test_lossless_is_not_judged_where_it_cannot_be(changes: dict[str, Any], status: str) -> None:
    parted = measured(tokens={"p2": [0, 1, 2, 7, 4, 5, 6, 7, 8, 9]}, **changes)
    assert statuses(held_against(parted, parted, "lossless", "tau<-1%"), "lossless") == {"not judged"}


def test_a_turn_that_fails_now_is_a_regression_whatever_the_gates() -> None:
    base = measured()
    rows = [row for row in base.rows if not (row.cell.method == "s3d" and row.prompt_id == "p1")]
    lost = [failed(cell("s3d"), prompt_id="p1", round=index, synthetic=False) for index in range(3)]
    new = factory.run(*rows, *lost, host=HOST, versions={"torch": "2"}, weights_sha256="1" * 64)
    found = held_against(base, new, "tau<-50%")
    assert [(one.gate, one.reason) for one in found.regressed] == [("finished", "1 turn now fails: oom: out of memory")]


def test_a_baseline_that_failed_on_one_side_is_a_regression_too() -> None:
    base = measured()
    rows = [row for row in base.rows if row.cell.method != "ar"]
    lost = [msgspec.structs.replace(row, outcome="oom") for row in base.rows if row.cell.method == "ar"]
    new = factory.run(*rows, *lost, host=HOST, versions={"torch": "2"}, weights_sha256="1" * 64)
    found = held_against(base, new)
    assert {one.gate for one in found.regressed if one.cell.startswith("ar")} == {"finished"}


def test_what_one_side_alone_knows_is_a_difference_either_way() -> None:
    one, two = measured(), measured()
    one = replace(one, manifest=msgspec.structs.replace(one.manifest, vram_budget_bytes=8))
    for sides in ((one, two), (two, one)):
        assert "vram_budget_bytes" in " ".join(unlike(*sides))


def without(run: Run, *methods: str) -> Run:
    """The run with the trials of these methods lost; its manifest still plans them."""
    return replace(run, rows=tuple(row for row in run.rows if row.cell.method not in methods))


def test_a_cell_that_was_planned_and_never_ran_is_a_regression() -> None:
    found = held_against(measured(), without(measured(), "s3d"), "tau<-1%", "lossless")
    assert [(one.gate, one.reason) for one in found.regressed] == [("finished", "planned, but NEW has no trial of it")]
    assert held_against(measured(), without(measured(), "ar", "s3d")).exit_status == 1


def test_the_baseline_alone_is_no_proof_that_texts_are_kept() -> None:
    found = held_against(measured(), measured(), "lossless")
    assert [one.cell.startswith("s3d") for one in found.judgements] == [True]
    nothing = without(measured(), "ar", "s3d")
    with pytest.raises(UserError, match="no gate could be judged"):
        held_against(nothing, nothing)
    alone = factory.run(*without(measured(), "s3d").rows)
    with pytest.raises(UserError, match="judged: these gates say nothing of the baseline"):
        held_against(alone, alone, "lossless")


def test_several_runs_of_one_side_are_one_set_of_rounds() -> None:
    side = gather("base", [measured(noise=(0.0,)), measured(noise=(0.02,))])
    found = compare(side, gather("new", [measured(noise=(0.0, 0.01))]), [parse_gate("speedup<-5%")])
    change = found.cells[1].changes["speedup"].change
    assert change is not None
    assert change.low is not None
    with pytest.raises(UserError, match="holds unlike runs"):
        gather("base", [measured(), measured(host=HOST | {"cpu": "Another CPU"})])


def test_nothing_in_common_and_nothing_to_judge_are_mistakes() -> None:
    with pytest.raises(UserError, match="no cell in common"):
        held_against(measured(), measured(bits="16"))
    with pytest.raises(UserError, match="no gate could be judged: the hosts differ"):
        held_against(measured(), measured(host=HOST | {"cpu": "Another CPU"}), "peak_bytes>+2%")


@pytest.mark.parametrize(
    ("text", "hint"),
    [("tau<1", "write 'tau<-1%'"), ("taw<-1%", "did you mean 'tau'"), ("speed", "lossless or output"), ("", "no gate")],
)
def test_a_gate_that_means_nothing_is_explained(text: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint.replace("(", r"\(")):
        parse_gate(text)


# --- the command ------------------------------------------------------------------------------------------------------


def written(folder: Path, run: Run) -> str:
    folder.mkdir()
    write_manifest(folder, run.manifest)
    for row in run.rows:
        append_trial(folder / "trials.jsonl", row)
    return str(folder)


def test_the_exit_status_is_0_same_1_regressed_2_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, worse = (
        written(tmp_path / name, measured(**changes)) for name, changes in (("base", {}), ("worse", {"speedup": 1.0}))
    )
    assert main(["compare", base, base]) == 0
    assert main(["compare", base, worse, "--fail-on", "speedup<-5%"]) == 1
    assert "REGRESSED: s3d" in capsys.readouterr().out
    assert main(["compare", base, worse, "--fail-on", "tau<-1%", "--fail-on", "output"]) == 0
    for wrong in ((base, "/nowhere"), (base, worse, "--fail-on", "tau"), (base,)):
        assert main(["compare", *wrong]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_torn_file_is_compared_and_said_to_be_torn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = written(tmp_path / "base", measured())
    torn = Path(written(tmp_path / "torn", measured())) / "trials.jsonl"
    torn.write_bytes(torn.read_bytes()[:-100])
    assert main(["compare", base, str(torn)]) == 0
    assert "1 line of NEW could not be read" in capsys.readouterr().out


def _without_text(run: Run, *prompts: str) -> Run:
    """The method's answers to these prompts end with their first token, so that nothing was decoded."""
    none: dict[str, Any] = {
        "new_tokens": [1],
        "round_seconds": [],
        "drafted": [],
        "drafted_depth": [],
        "accepted": [],
        "committed": [],
    }
    rows = [
        msgspec.structs.replace(row, decode_seconds=0.0, **none)
        if row.cell.method != "ar" and row.prompt_id in prompts
        else row
        for row in run.rows
    ]
    return replace(run, rows=tuple(rows))


def test_a_turn_that_one_side_decoded_nothing_of_is_in_neither() -> None:
    """Prompts pair by their name, also where the first token ended a text."""
    other = {"cpu": "another"}
    base, new = measured(passes=(3, 1, 2)), measured(passes=(3, 1, 2), host=HOST | other)
    found = held_against(_without_text(base, "p0"), _without_text(new, "p3"), "tau<-1%")
    assert statuses(found, "tau<-1%") == {"ok"}
    (change,) = [cell.changes["tau"] for cell in found.cells if cell.label == "s3d"]
    assert change.change is not None
    assert (change.base, change.new) == (2, 2)


def test_memory_held_is_exact_on_the_same_prompts_only() -> None:
    def holding(size: int, prefix: str) -> Run:
        run = measured()
        rows = [
            msgspec.structs.replace(
                row,
                prompt_id=f"{prefix}{row.prompt_id}",
                memory=msgspec.structs.replace(row.memory, weights_bytes=100, drafter_bytes=0, cache_bytes=size),
            )
            for row in run.rows
        ]
        facts = msgspec.structs.replace(run.manifest, prompt_set_sha256=prefix * 64)
        return replace(run, rows=tuple(rows), manifest=facts)

    gates = ("held_bytes>+2%", "lossless")
    assert statuses(held_against(holding(10, "a"), holding(20, "a"), *gates), gates[0]) == {"regressed"}
    assert statuses(held_against(holding(10, "a"), holding(20, "b"), *gates), gates[0]) == {"not judged"}


def test_a_round_cut_short_opens_no_gate() -> None:
    """NEW is a quarter slower in two rounds; a third was killed after a prompt that gains more than the others do."""

    def runs(pace: float, rounds: Sequence[int]) -> Run:
        trials = [
            trial(
                cell(name),
                [1] * 8 if name == "ar" else [tokens] * (8 // tokens),
                seconds,
                round=round,
                prompt_id=f"p{i}",
            )
            for round, prompts in enumerate(rounds)
            for i in range(prompts)
            for tokens in (4 if i < 2 else 2,)
            for name, seconds in (("ar", 0.1 + 0.001 * round), ("s3d", 0.12 * pace))
        ]
        return factory.run(*trials, host=HOST, versions={"torch": "2"}, weights_sha256="1" * 64)

    for rounds in ((10, 10), (10, 10, 1)):
        found = held_against(runs(1.0, (10, 10)), runs(1.3, rounds), "speedup<-10%")
        assert statuses(found, "speedup<-10%") == {"regressed"}, rounds
