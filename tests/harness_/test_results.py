"""Result files are a public format: every version loads for ever, a torn file loads but for its torn line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import factory
import msgspec
import pytest

from harness.errors import UserError
from harness.metrics import summary
from harness.results import SCHEMA, append_trial, read_run, read_runs, read_trials, write_manifest
from reports.page import render
from reports.tables import warnings

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.parametrize("version", range(1, SCHEMA + 1))
def test_every_version_loads_and_says_what_it_said(version: int) -> None:
    run = read_run(GOLDEN / f"v{version}")
    assert run.skipped_lines == 0
    assert len(run.rows) == len(run.manifest.cells) * 4 * run.manifest.rounds
    taus = {row.cell.label: row.tau for row in summary(run)}
    assert taus == {"ar": 1.0, "prompt-lookup": 1.0, "layerskip": pytest.approx(40 / 38)}
    assert "layerskip" in render([run])


def golden_copy(folder: Path) -> Path:
    return shutil.copytree(GOLDEN / "v1", folder / "run")


def test_a_file_cut_off_in_a_line_loads_all_but_that_line_and_says_so(tmp_path: Path) -> None:
    directory = golden_copy(tmp_path)
    trials = directory / "trials.jsonl"
    lines = trials.read_bytes().splitlines(keepends=True)
    trials.write_bytes(b"".join(lines[:-1]) + lines[-1][:200])
    run = read_run(directory)
    assert (len(run.rows), run.skipped_lines) == (len(lines) - 1, 1)
    assert any(line.startswith("1 line of trials.jsonl could not be read") for line in warnings(run, summary(run)))


@pytest.mark.parametrize(
    ("field", "changed"),
    [("run", '"\\udcff"'), ("accepted", "[0]"), ("committed", "[1, 2, 3]"), ("new_tokens", "null")],
)
def test_a_line_that_nobody_could_have_written_is_not_read(field: str, changed: str, tmp_path: Path) -> None:
    directory = golden_copy(tmp_path)
    trials = directory / "trials.jsonl"
    first, *rest = trials.read_text().splitlines(keepends=True)
    raw = json.loads(first)
    line = json.dumps(raw | {field: "HERE"}).replace('"HERE"', changed).encode()
    trials.write_bytes(line.replace(b"\\udcff", b"\xff") + b"\n" + "".join(rest).encode())
    run = read_run(directory)
    assert (len(run.rows), run.skipped_lines) == (len(rest), 1)
    assert next(read_trials(trials)) is None
    assert render([run])


def test_a_run_that_was_cut_short_says_so_and_tells_the_rounds_that_it_has(tmp_path: Path) -> None:
    whole = factory.run(*(factory.trial(factory.cell(name), round=index) for index in (0, 1) for name in ("ar", "s3d")))
    assert not any("missing" in line for line in warnings(whole, summary(whole)))
    cut = dataclasses.replace(whole, rows=tuple(row for row in whole.rows if row.round == 0))
    assert "2 of 4 planned trials are missing" in " ".join(warnings(cut, summary(cut)))
    assert "over 1 round." in render([cut])
    early = dataclasses.replace(whole, manifest=msgspec.structs.replace(whole.manifest, rounds=1), rows=whole.rows[:3])
    assert "1 of 4 planned trials are missing" in " ".join(warnings(early, summary(early)))


def test_unknown_fields_are_kept(tmp_path: Path) -> None:
    """What a newer program wrote is in the raw line, and survives a manifest that this program writes anew."""
    directory = golden_copy(tmp_path)
    trials, manifest = directory / "trials.jsonl", directory / "manifest.json"
    first, *rest = trials.read_text().splitlines(keepends=True)
    trials.write_text(json.dumps(json.loads(first) | {"moon_phase": 0.5}) + "\n" + "".join(rest))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tides": ["high"]}))
    read = next(read_trials(trials))
    assert read is not None
    assert read[1]["moon_phase"] == 0.5
    write_manifest(directory, read_run(directory).manifest)
    assert json.loads(manifest.read_text())["tides"] == ["high"]
    append_trial(trials, read[0])
    assert json.loads(trials.read_text().splitlines()[0])["moon_phase"] == 0.5


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    newer = msgspec.structs.replace(factory.trial(factory.cell()), schema=SCHEMA + 1)
    append_trial(tmp_path / "newer.jsonl", newer)
    with pytest.raises(UserError, match="update the harness"):
        read_runs(tmp_path / "newer.jsonl")


def test_a_path_may_be_a_run_a_directory_of_runs_or_a_file(tmp_path: Path) -> None:
    golden_copy(tmp_path)
    (run,) = read_runs(tmp_path)
    assert [read_runs(path) for path in (tmp_path / "run", tmp_path / "run" / "trials.jsonl")] == [[run], [run]]
    alone = shutil.copy(tmp_path / "run" / "trials.jsonl", tmp_path / "baseline.jsonl")
    (bare,) = read_runs(alone)
    assert bare.rows == run.rows
    assert bare.manifest.host == {}
    taus, expected = ({row.cell.label: row.tau for row in summary(one)} for one in (bare, run))
    assert taus == expected


@pytest.mark.parametrize("content", [None, "", "{}\n"])
def test_what_holds_no_trial_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"give a run, a directory of runs, or a trials\.jsonl"):
        read_runs(path)
    with pytest.raises(UserError, match="holds no run"):
        read_runs(tmp_path)
