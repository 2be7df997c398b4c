"""A whole run through the command line, with a stranger's decoders: failures, resumption, interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import stranger
import tiny_chat

import harness
from harness import method
from harness.results import Run, read_run

REPOSITORY = Path(__file__).resolve().parents[2]
STRANGERS = "echo:gamma=3,greedy-for-memory,refuses,unfit,buggy,dies"


class Desk(NamedTuple):
    """A model, prompts, a stranger's package, and a finished run of it."""

    folder: Path
    exit_status: int
    stdout: str
    stderr: str

    @property
    def run(self) -> Run:
        return read_run(self.folder / "run")


def command(folder: Path, out: str, *options: str) -> tuple[list[str], dict[str, str]]:
    asked = ["--prompts", str(folder / "prompts.jsonl"), "--out", str(folder / out), "--bits", "32"]
    path = os.pathsep.join((str(folder / "stranger"), str(REPOSITORY)))
    environment = os.environ | {"PYTHONPATH": path, "HARNESS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "harness", "run", *asked, *options], environment


def toy(folder: Path) -> tuple[str, ...]:
    return ("--model", str(folder / "toy"), "--max-new-tokens", "6")


def launch(folder: Path, out: str, *options: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(folder, out, *options)
    return subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    tiny_chat.save(folder / "toy")
    tiny_chat.prompts(folder / "prompts.jsonl")
    stranger.install(folder / "stranger")
    done = launch(folder, "run", *toy(folder), "--methods", STRANGERS)
    return Desk(folder, done.returncode, done.stdout, done.stderr)


def outcomes(run: Run, method: str) -> Counter[str]:
    return Counter(row.outcome for row in run.rows if row.cell.method == method)


def reasons(run: Run, method: str) -> set[str]:
    return {row.reason or "" for row in run.rows if row.cell.method == method}


def test_a_strangers_decoder_runs_untouched(desk: Desk) -> None:
    assert desk.exit_status == 0, desk.stderr
    assert outcomes(desk.run, "echo") == {"ok": 4}
    echo, baseline = (
        [row.new_tokens for row in desk.run.rows if row.cell.method == name and row.outcome == "ok"]
        for name in ("echo", "ar")
    )
    assert echo == baseline
    assert {max(row.drafted or ()) for row in desk.run.rows if row.cell.method == "echo" and row.drafted} == {3}


def test_whatever_goes_wrong_is_a_row_with_its_reason(desk: Desk) -> None:
    assert outcomes(desk.run, "greedy-for-memory") == {"oom": 4}
    assert reasons(desk.run, "greedy-for-memory") == {"tried to allocate 80 GiB"}
    assert outcomes(desk.run, "refuses") == {"unsupported": 4}
    assert reasons(desk.run, "refuses") == {"gamma must be odd: choose 3"}
    assert outcomes(desk.run, "unfit") == {"unsupported": 4}
    assert reasons(desk.run, "unfit") == {"cannot run in 32 bits"}
    assert outcomes(desk.run, "dies") == {"killed": 4}
    assert {reason[:17] for reason in reasons(desk.run, "dies")} == {"killed by SIGKILL"}


def test_a_prompt_that_fails_does_not_take_the_others_with_it(desk: Desk) -> None:
    assert outcomes(desk.run, "buggy") == {"ok": 1, "error": 3}
    (reason,) = reasons(desk.run, "buggy") - {""}
    assert "RuntimeError: index out of luck" in reason
    assert "stranger_decoders.py" in reason


def test_a_failed_trial_borrows_no_number(desk: Desk) -> None:
    for row in desk.run.rows:
        if row.outcome != "ok":
            assert (row.new_tokens, row.decode_seconds, row.memory, row.text) == (None, None, None, None)


def test_every_cell_has_one_row_a_turn(desk: Desk) -> None:
    assert desk.run.skipped_lines == 0
    assert set(Counter(row.key for row in desk.run.rows).values()) == {1}
    assert len(desk.run.rows) == 4 * len(desk.run.manifest.cells) == 28


def test_the_manifest_says_what_and_where(desk: Desk) -> None:
    manifest = desk.run.manifest
    assert manifest.model == "toy"
    assert (manifest.prompts, manifest.turns, manifest.rounds, manifest.max_new_tokens) == (3, 2, 1, 6)
    assert manifest.preliminary
    assert len(manifest.weights_sha256 or "") == len(manifest.first_answers_sha256 or "") == 64
    assert manifest.host["memory_bytes"] > 0
    assert manifest.host["torch_threads"] == 1
    assert any(line.startswith("One round") for line in manifest.warnings)
    assert {"spec-harness", "torch", "transformers"} <= set(manifest.versions)


def test_plan_progress_and_result_are_shown(desk: Desk) -> None:
    assert "unfit: cannot run in 32 bits" in desk.stdout
    assert "Preliminary" in desk.stdout
    assert "warning: One round" in desk.stdout
    assert "unsupported, 4 of 4 trials: cannot run in 32 bits" in desk.stdout.replace("\n", " ")
    assert str(desk.folder / "run" / "report.html") in desk.stdout
    assert (desk.folder / "run" / "report.html").stat().st_size > 1000
    assert "prompt 4/4" in desk.stderr
    assert "tok/s" in desk.stderr
    assert "left]" in desk.stderr
    assert "Traceback" not in desk.stderr


def test_a_run_goes_on_where_it_stopped(desk: Desk) -> None:
    """Some rows are missing and the last line is half a line: only what is missing is measured."""
    shutil.copytree(desk.folder / "run", desk.folder / "resumed")
    trials = desk.folder / "resumed" / "trials.jsonl"
    lines = [line for line in trials.read_text().splitlines(keepends=True) if json.loads(line)["outcome"] != "killed"]
    lost = next(i for i, line in enumerate(lines) if json.loads(line)["cell"]["method"] == "echo")
    kept = [line for i, line in enumerate(lines) if i != lost]
    trials.write_text("".join(kept) + lines[lost][:50])
    done = launch(desk.folder, "resumed", *toy(desk.folder), "--methods", STRANGERS)
    assert done.returncode == 0, done.stderr
    assert trials.read_text().startswith("".join(kept))
    run = read_run(desk.folder / "resumed")
    assert run.skipped_lines == 1
    assert outcomes(run, "echo") == {"ok": 4}
    assert outcomes(run, "dies") == {"killed": 4}, "what was killed is tried again"
    assert "echo:gamma=3 in 32: prompt 1/1" in done.stderr
    assert "cell ar" not in done.stderr


@pytest.mark.parametrize("isolation", ["cell", "run"])
def test_rounds_and_cells_may_share_a_process(desk: Desk, isolation: str) -> None:
    """What dies takes its own round with it, and nothing of the others."""
    done = launch(
        desk.folder,
        f"by-{isolation}",
        *toy(desk.folder),
        "--methods",
        STRANGERS,
        "--rounds",
        "2",
        "--isolation",
        isolation,
    )
    assert done.returncode == 0, done.stderr
    shared = read_run(desk.folder / f"by-{isolation}")
    assert shared.manifest.isolation == isolation
    for name in ("ar", *(spec.partition(":")[0] for spec in STRANGERS.split(","))):
        once = outcomes(desk.run, name)
        assert outcomes(shared, name) == once + once
    assert {row.round for row in shared.rows} == {0, 1}
    texts = [{row.text for row in run.rows if row.outcome == "ok"} for run in (desk.run, shared)]
    assert texts[0] == texts[1]


def test_python_gives_the_same_run(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished run is opened through the API: nothing is left to measure but what was killed."""
    shutil.copytree(desk.folder / "run", desk.folder / "again")
    _, environment = command(desk.folder, "again")
    monkeypatch.setenv("HARNESS_CACHE", environment["HARNESS_CACHE"])
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    monkeypatch.setattr("torch.get_num_threads", lambda: desk.run.manifest.host["torch_threads"])
    monkeypatch.syspath_prepend(desk.folder / "stranger")
    method.installed.cache_clear()
    done = harness.run(
        STRANGERS,
        model=desk.folder / "toy",
        prompts=desk.folder / "prompts.jsonl",
        out=desk.folder / "again",
        bits=32,
        max_new_tokens=6,
    )
    method.installed.cache_clear()
    trials = done.trials()
    assert len(trials) == 28
    assert set(trials[trials.outcome == "ok"].method) == {"ar", "echo", "buggy"}
    assert {row.cell.method for row in done.summary()} == {one.method for one in desk.run.manifest.cells}
    assert done.report() == done.directory / "report.html"
    assert harness.open_run(desk.folder / "again").directory == done.directory


def test_another_plan_does_not_go_into_the_same_directory(desk: Desk) -> None:
    done = launch(desk.folder, "run", *toy(desk.folder), "--methods", "echo", "--seed", "7")
    assert done.returncode == 2
    assert "seed was 0, now 7" in done.stderr
    assert "give another --out" in done.stderr
    assert "Traceback" not in done.stderr


def dawdling(desk: Desk, out: str) -> subprocess.Popen[str]:
    """A run that has begun to decode, into `out`."""
    line, environment = command(desk.folder, out, *toy(desk.folder), "--methods", "dawdles", "--seed", "1")
    process = subprocess.Popen(line, env=environment, cwd=desk.folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for said in process.stderr:
        if "dawdles in 32: prompt 1/4" in said:
            break
    return process


def test_a_directory_has_one_run_at_a_time_and_a_killed_run_leaves_nobody_behind(desk: Desk) -> None:
    first = dawdling(desk, "taken")
    second = launch(desk.folder, "taken", *toy(desk.folder), "--methods", "dawdles", "--seed", "1")
    assert second.returncode == 2
    assert "another run is writing into" in second.stderr
    assert "Traceback" not in second.stderr
    workers = psutil.Process(first.pid).children()
    assert len(workers) == 1
    first.kill()
    first.communicate()
    assert not psutil.wait_procs(workers, timeout=5)[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_stops_the_worker_and_says_how_to_go_on(number: int, desk: Desk) -> None:
    out = f"stopped-{number}"
    process = dawdling(desk, out)
    assert process.stderr is not None
    workers = psutil.Process(process.pid).children()
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(timeout=20) == 130
    assert "interrupted; `python -m harness run " in rest
    assert "goes on where it stopped" in rest
    assert "Traceback" not in rest
    assert len(workers) == 1
    assert not psutil.wait_procs(workers, timeout=5)[1]
    run = read_run(desk.folder / out)
    assert outcomes(run, "dawdles") == {"ok": 1}, "an interruption is no result"
