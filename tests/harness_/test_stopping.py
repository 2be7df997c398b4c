"""`--rounds auto`: when it ends, that it measures nothing twice, and what looking after every round costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
from factory import cell, trial

from harness import child, runner
from harness.errors import UserError
from harness.metrics import Row, summary
from harness.plan import AUTO_ROUNDS, Job, Plan, plan, read_request, seconds
from harness.results import append_trial, read_run
from harness.stats import ratio_interval_over_rounds
from harness.stopping import Pace, width
from harness.weights import ModelSource
from prompts import Prompt, PromptSet

PACE = Pace(precision=0.02, budget=100.0, fewest=5, most=50)


def rows(noise: float) -> list[Row]:
    """`ar`, a steady method, and one whose speed-up varies by `noise` from round to round."""
    trials = []
    for index in range(6):
        swing = noise * (-1) ** index
        for name, seconds_each in (("ar", 0.1), ("steady", 0.05), ("shaky", 0.05 * (1 + swing))):
            trials.append(trial(cell(name), [1] * 4, seconds_each, round=index))
    return summary(factory.run(*trials))


def test_it_ends_when_every_interval_is_narrow_and_not_before_the_fewest_rounds() -> None:
    assert PACE.ended(4, rows(0.0), 1.0, 1.0) is None
    assert "precise" in (PACE.ended(5, rows(0.0), 1.0, 1.0) or "")
    assert PACE.ended(6, rows(0.1), 1.0, 1.0) is None


def test_it_ends_where_another_round_would_not_fit_the_time_and_says_what_is_wide() -> None:
    assert PACE.ended(6, rows(0.1), 89.0, 10.0) is None
    told = PACE.ended(6, rows(0.1), 91.0, 10.0) or ""
    assert "the time is over after 6 rounds: the widest interval is shaky's" in told
    assert "50 rounds are the most" in (PACE.ended(50, rows(0.1), 1.0, 1.0) or "")


def test_a_run_with_nothing_to_compare_ends() -> None:
    alone = summary(factory.run(*(trial(cell("ar"), round=index) for index in range(5))))
    assert "nothing to be precise about" in (PACE.ended(5, alone, 1.0, 1.0) or "")


def test_stopping_at_the_first_narrow_interval_misses_the_truth_in_at_most_8_percent() -> None:
    """Simulated: process noise of 2 %, 500 runs that end at an interval 3 % wide, seeded; 7.8 % in 1,000 runs."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(500):
        over, under = np.exp(rng.normal(0, 0.02, (2, AUTO_ROUNDS[1])))
        for count in range(AUTO_ROUNDS[0], AUTO_ROUNDS[1] + 1):
            interval = ratio_interval_over_rounds(1.7 * over[:count], under[:count])
            if width(interval) < 0.03:
                break
        assert interval.low is not None
        assert interval.high is not None
        missed += not interval.low <= 1.7 <= interval.high
    assert missed / 500 <= 0.08


# --- a run ------------------------------------------------------------------------------------------------------------


def planned(**request: Any) -> Plan:
    prompts = PromptSet(name="toy", prompts=(Prompt(id="a", category="writing", turns=("one",)),), source="this test")
    given = {"bits": "32", "methods": "prompt-lookup", "rounds": "auto"} | request
    return plan(read_request(given), source=ModelSource("toy", "/toy", "local"), device="cpu", prompt_set=prompts)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Instead of processes: what they would have decoded, and rows whose speed-up varies less and less."""
    done: list[tuple[str, int]] = []

    def work(batch: list[Job], plan: Plan, folder: Path, on_event: child.Emit) -> None:
        (job,) = batch
        if not runner.worker.missing(job, plan):
            return
        of = plan.cells[job.cell].cell
        done.append((of.method, job.round))
        shake = 0.03 / (1 + job.round) * (-1) ** job.round if of.method != "ar" else 0.0
        row = trial(of, [1] * 4, 0.1 + shake, prompt_id="a", round=job.round)
        append_trial(Path(job.trials), row)

    prepared = child.Prepared(weights_sha256="0", first_answers_sha256=None, sources={})
    monkeypatch.setattr(runner, "_prepare", lambda *_: prepared)
    monkeypatch.setattr(runner, "_work", work)
    monkeypatch.setattr(runner.host, "contention", lambda device: [])
    return done


def test_a_run_goes_on_until_it_is_precise_and_a_finer_one_goes_on_from_there(
    decoded: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[child.Event] = []
    written: list[int] = []
    write = runner.write_manifest
    monkeypatch.setattr(runner, "write_manifest", lambda *given: written.append(given[1].rounds) or write(*given))
    runner.execute(planned(precision=0.2), tmp_path / "run", events.append)
    first = read_run(tmp_path / "run").manifest
    assert AUTO_ROUNDS[0] <= first.rounds < 20
    assert first.precision == 0.2
    assert not any(line.startswith("Rounds ended early") for line in first.warnings)
    in_turn = [max(AUTO_ROUNDS[0], done) for done in range(1, 1 + first.rounds)]
    assert written[-1 - first.rounds :] == [*in_turn, first.rounds], "what an interrupted run had planned, or has"
    runner.execute(planned(precision=0.1), tmp_path / "run", events.append)
    again = read_run(tmp_path / "run").manifest
    assert again.rounds > first.rounds
    assert again.precision == 0.1
    assert len(decoded) == len(set(decoded)) == 2 * again.rounds, "nothing is measured twice"
    announced = sum(event.trials for event in events if isinstance(event, child.Left))
    assert announced == len(decoded)


def test_a_run_whose_time_is_over_says_so(decoded: list[tuple[str, int]], tmp_path: Path) -> None:
    runner.execute(planned(time_budget="0.000001s"), tmp_path / "run", lambda event: None)
    manifest = read_run(tmp_path / "run").manifest
    assert manifest.rounds == 1
    assert manifest.preliminary
    assert any(
        "the time is over after 1 rounds: no interval" in line or "prompt-lookup" in line for line in manifest.warnings
    )


def test_a_foreign_manifest_is_left_alone(decoded: list[tuple[str, int]], tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    for content in ('{"name": "an extension", "version": "1"}', "[]", "no JSON"):
        manifest.write_text(content)
        with pytest.raises(UserError, match="holds no run of this program: give another --out"):
            runner.execute(planned(), tmp_path, lambda event: None)
        assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
        assert manifest.read_text() == content


def test_a_run_that_decoded_nothing_yet_begins_again(decoded: list[tuple[str, int]], tmp_path: Path) -> None:
    runner.execute(planned(precision=0.2), tmp_path / "run", lambda event: None)
    (tmp_path / "run" / "trials.jsonl").unlink()
    before = len(decoded)
    runner.execute(planned(precision=0.2), tmp_path / "run", lambda event: None)
    assert len(decoded) == 2 * before


@pytest.mark.parametrize(
    ("status", "reason"), [(-9, "killed by SIGKILL"), (1, "exited with 1: no room"), (0, "exited with 0: no room")]
)
def test_a_prepare_step_that_dies_is_one_line_with_its_log(
    status: int, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def die(module: str, arguments: list[Path], log: Path, *_: object) -> int:
        log.write_text("Traceback\nno room\n")
        return status

    monkeypatch.setattr(runner.child, "run", die)
    monkeypatch.setattr(runner.host, "contention", lambda device: [])
    with pytest.raises(UserError, match=reason) as told:
        runner.execute(planned(), tmp_path / "run", lambda event: None)
    assert str(told.value).endswith(f"see {tmp_path / 'run' / 'workers' / 'prepare.log'}")


def test_a_time_is_seconds_minutes_or_hours() -> None:
    assert [seconds(written) for written in (90, "90", "1.5m", "2h", None)] == [90, 90, 90, 7200, 3600]
    for wrong in ("soon", "-3", "0", "5d"):
        with pytest.raises(UserError, match="write seconds, or 20m, or 2h"):
            seconds(wrong)
