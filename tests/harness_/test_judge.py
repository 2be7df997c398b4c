"""Differing texts of a run, scored again in float64: near-ties are told from errors, and the exit status says so."""

from __future__ import annotations

from pathlib import Path

import factory
import msgspec
import pytest
import tiny_chat
from factory import cell, trial

import prompts
from harness import child, cli, judge, prepare, weights, worker
from harness.metrics import Row, summary, unjudged
from harness.plan import Job, RunJob, plan, read_request
from harness.results import Judged, Manifest, append_trial, read_run, read_trials, write_manifest


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunJob:
    """A run of `ar` and `prompt-lookup` on a tiny model, made in this process."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "run"
    directory.mkdir()
    model = weights.resolve(str(tiny_chat.save(tmp_path / "toy")))
    request = read_request({"methods": "prompt-lookup", "bits": 32, "max_new_tokens": 12})
    prompt_set = prompts.load(str(tiny_chat.prompts(tmp_path / "prompts.jsonl")))
    planned = plan(request, source=model, device="cpu", prompt_set=prompt_set)
    (directory / "plan.json").write_bytes(msgspec.json.encode(planned))
    prepare.prepare(directory, lambda event: None)
    for index, one in enumerate(planned.cells):
        job = Job(
            run="toy", plan="", trials=str(directory / "trials.jsonl"), cell=index, round=0, order=index,
            first_answers=str(directory / "first_answers.json"), source=model,
        )  # fmt: skip
        assert one.unsupported is None
        worker.work(job, planned, lambda event: None)
    write_manifest(
        directory,
        Manifest(
            run="toy", created="", command=[], model="toy", prompt_set="toy", prompt_set_sha256="", prompts=3, turns=2,
            cells=[one.cell for one in planned.cells], rounds=1, seed=0, max_new_tokens=12,
        ),
    )  # fmt: skip
    return RunJob(directory=str(directory), sources={"base": model})


def spoil(directory: Path, prompt_id: str, turn: int, position: int) -> None:
    """Give prompt-lookup another token at one place."""
    path = directory / "trials.jsonl"
    rows = [row[0] for row in read_trials(path) if row is not None]
    path.unlink()
    for row in rows:
        if (row.cell.method, row.prompt_id, row.turn) == ("prompt-lookup", prompt_id, turn):
            tokens = list(row.new_tokens or ())
            tokens[position] = (tokens[position] + 1) % 200 + 6
            row = msgspec.structs.replace(row, new_tokens=tokens)
        append_trial(path, row)


def verdict(directory: Path) -> Row:
    return next(row for row in summary(read_run(directory)) if row.cell.method == "prompt-lookup")


def test_an_error_is_confirmed_in_float64_and_fails_the_run(
    finished: RunJob, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(finished.directory)
    assert unjudged(read_run(directory)) == []
    assert verdict(directory).verdict.kind == "identical"
    assert cli._show_result(directory, json=False) == 0
    spoil(directory, "two", 1, 4)
    assert verdict(directory).verdict.kind == "differs"
    events: list[child.Event] = []
    judge.judge(finished, events.append)
    assert [type(event) for event in events] == [child.Preparing]
    (found,) = read_run(directory).judged
    assert (found.prompt_id, found.turn, found.position) == ("two", 1, 4)
    assert found.margin is not None
    assert found.margin > 2e-4
    told = verdict(directory).verdict
    assert (told.kind, told.differing, told.first_position, told.margin) == ("diverged", 1, 4, found.margin)
    assert cli._show_result(directory, json=False) == 1
    assert "DIVERGED" in capsys.readouterr().out


def test_what_was_judged_is_not_judged_again(finished: RunJob) -> None:
    directory = Path(finished.directory)
    spoil(directory, "one", 0, 2)
    judge.judge(finished, lambda event: None)
    once = (directory / "judged.jsonl").read_bytes()
    judge.judge(finished, lambda event: None)
    assert (directory / "judged.jsonl").read_bytes() == once
    (directory / "judged.jsonl").write_bytes(once[:20])  # a torn line is judged again
    judge.judge(finished, lambda event: None)
    assert len(read_run(directory).judged) == 1


def test_a_target_that_cannot_be_scored_stays_unjudged_and_says_so(
    finished: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(finished.directory)
    spoil(directory, "one", 0, 2)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr(weights, "load", fail)
    events: list[child.Event] = []
    judge.judge(finished, events.append)
    assert isinstance(events[-1], child.Warned)
    assert "1 differing answer could not be judged in float64: oom" in events[-1].warning
    assert verdict(directory).verdict.kind == "differs"


@pytest.mark.parametrize(
    ("bits", "margin", "kind"),
    [
        ("32", 1e-5, "near_tie"),
        ("32", 3e-4, "diverged"),
        ("16", 0.2, "near_tie"),
        ("16", 0.3, "diverged"),
        ("32", None, "diverged"),
    ],
)
def test_a_margin_decides(bits: str, margin: float | None, kind: str) -> None:
    own = cell("s3d", bits=bits)
    judged = (Judged(cell=own.id, prompt_id="p0", turn=0, position=2, margin=margin),)
    run = factory.run(trial(cell("ar", bits=bits)), trial(own, [2, 1], tokens=[0, 1, 9, 3]))
    run = factory.judged(run, judged)
    assert summary(run)[1].verdict.kind == kind


def test_where_bits_tell_nothing_32_bits_are_told_beside() -> None:
    trials = [
        trial(cell(name, bits=bits), [1] * 3, tokens=tokens)
        for bits in ("32", "int8:t6")
        for name, tokens in (("ar", [0, 1, 2, 3]), ("s3d", [0, 1, 2, 3] if bits == "32" else [0, 1, 7, 3]))
    ]
    kinds = {(row.cell.method, row.cell.bits): row.verdict for row in summary(factory.run(*trials))}
    assert kinds["s3d", "int8:t6"].kind == "not_testable"
    assert kinds["s3d", "int8:t6"].at_32_bits == "identical"
