"""The history: a run is kept once and whole, series hold what may stand together, and the page shows the steps."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import factory
import pytest
from factory import cell, trial

from harness.cli import main
from harness.errors import UserError
from harness.history import add, series
from harness.results import append_trial, write_manifest

HOST = {"cpu": "Some CPU", "threads": 2}


def written(folder: Path, day: int, seconds: float = 0.1, **manifest: Any) -> Path:
    """A made-up run of `ar` and `s3d`, of commit 000...day."""
    directory = folder / f"run-{day}-{seconds}"
    directory.mkdir()
    trials = [
        trial(of, committed, each * (1 + 0.001 * (index + day % 3)), round=index, synthetic=True)
        for index in range(2)
        for of, committed, each in ((cell("ar"), [1] * 6, 0.1), (cell("s3d"), [2, 2, 2], seconds))
    ]
    facts = {"run": directory.name, "created": f"2026-01-{day + 1:02}T00:00:00+00:00"}
    run = factory.run(*trials, **facts | {"host": HOST | {"git_commit": f"{day:040}"}} | manifest)
    write_manifest(directory, run.manifest)
    for row in run.rows:
        append_trial(directory / "trials.jsonl", row)
    return directory


def test_a_run_is_kept_once_and_whole(tmp_path: Path) -> None:
    file, run = tmp_path / "history.sqlite", written(tmp_path, 0)
    manifest = run / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tides": "high"}))
    assert add(file, [run]) == 1
    assert add(file, [run, written(tmp_path, 1)]) == 1
    with sqlite3.connect(file) as opened:
        kept = opened.execute("select manifest, trials from runs order by created").fetchall()
    assert len(kept) == 2
    assert zlib.decompress(kept[0][0]) == manifest.read_bytes()
    assert zlib.decompress(kept[0][1]) == (run / "trials.jsonl").read_bytes()


def test_a_run_without_a_measured_trial_is_refused(tmp_path: Path) -> None:
    run = written(tmp_path, 0)
    (run / "trials.jsonl").write_text("")
    with pytest.raises(UserError, match="no trial that was measured"):
        add(tmp_path / "history.sqlite", [written(tmp_path, 1), run])
    assert not (tmp_path / "history.sqlite").exists()


def test_series_are_in_the_order_of_time_and_of_one_task_and_machine(tmp_path: Path) -> None:
    file = tmp_path / "history.sqlite"
    add(file, [written(tmp_path, day) for day in (2, 0, 1)])
    add(file, [written(tmp_path, 3, host={"cpu": "Another CPU"}), written(tmp_path, 4, max_new_tokens=64)])
    found = {(one.metric, one.label, one.machine, len(one.points)): one for one in series(file)}
    assert ("tau", "s3d", "", 4) in found, "tau does not ask which machine"
    assert ("tau", "s3d", "", 1) in found, "but which task"
    assert ("peak_bytes", "s3d", "Another CPU", 1) in found
    points = found["speedup", "s3d", "Some CPU", 3].points
    assert [point.commit for point in points] == [f"{day:040}" for day in (0, 1, 2)]
    assert all(point.low is not None and point.low <= point.value for point in points)
    assert not any(one.label == "ar" and one.metric != "peak_bytes" for one in found.values())


def test_the_page_marks_a_step_with_its_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "history.sqlite"
    runs = [str(written(tmp_path, day, 0.1 if day < 8 else 0.12)) for day in range(14)]
    assert main(["history", "add", *runs[:9], "--file", str(file)]) == 0
    assert main(["history", "show", "--file", str(file)]) == 0
    page = (tmp_path / "history.html").read_text()
    assert "steps are looked for from 10 runs on" in page
    assert "SYNTHETIC" in page
    assert main(["history", "add", *runs[9:], "--file", str(file)]) == 0
    assert main(["history", "show", "--file", str(file), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Over 14 runs" in page
    assert "-16.6" in page
    assert "at 000000000 (after 000000000)" in page
    assert "<script" not in page
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "page.html")


def test_what_is_no_history_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="history add RUN` begins one"):
        series(tmp_path / "none.sqlite")
    broken = tmp_path / "broken.sqlite"
    broken.write_text("this is a text of some length and no database at all, whatever its name says" * 20)
    with pytest.raises(UserError, match="name another --file"):
        series(broken)
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as file:
        file.execute("pragma user_version = 99")
    with pytest.raises(UserError, match="update the harness"):
        series(newer)


@pytest.mark.parametrize("version", [0, 1])
def test_a_database_of_another_program_is_left_alone(tmp_path: Path, version: int) -> None:
    path, run = tmp_path / "other.db", written(tmp_path, 0)
    with sqlite3.connect(path) as file:
        file.execute("create table letters (text)")
        file.execute(f"pragma user_version = {version}")
    before = path.read_bytes()
    for use in (lambda: add(path, [run]), lambda: series(path)):
        with pytest.raises(UserError, match="of another program: name another --file"):
            use()
    assert path.read_bytes() == before


def test_a_run_that_cannot_be_read_adds_nothing(tmp_path: Path) -> None:
    file = tmp_path / "history.sqlite"
    with pytest.raises(UserError, match="is not a run"):
        add(file, [written(tmp_path, 0), tmp_path])
    assert not file.exists()


def test_the_history_needs_no_torch(tmp_path: Path) -> None:
    run = written(tmp_path, 0)
    code = (
        "import sys; from harness.cli import main; "
        f"at = ['--file', 'h.sqlite']; main(['history', 'add', {str(run)!r}, *at]); main(['history', 'show', *at]); "
        "assert 'torch' not in sys.modules"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PYTHONPATH": root, "PATH": ""})
