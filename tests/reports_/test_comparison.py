"""What `compare` writes: every form says the same, and each is what its reader takes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.compare import CellComparison, Comparison
from harness.gates import Change, Judgement
from harness.stats import Interval
from reports import comparison as written

HOSTILE = "s3d|<b>x</b>\n`&\"'"


@pytest.fixture
def found() -> Comparison:
    """Made up by hand: a regression, a pass, and a gate that could not be judged."""
    changes = {
        "tau": Change("tau", 2.0, 1.5, Interval(0.75, 0.75, 0.75, "exact")),
        "speedup": Change("speedup", 1.5, 1.4, Interval(0.93, 0.9, 1.01, "t")),
        "peak_bytes": Change("peak_bytes", 2.0**30, 2.0**30, None, "the hosts differ"),
    }
    cells = (CellComparison(HOSTILE, HOSTILE, "32", 8, changes, ("identical", "identical")),)
    judgements = (
        Judgement("tau<-1%", HOSTILE, "regressed", "-25.00 %"),
        Judgement("speedup<-5%", HOSTILE, "ok", "-7.00 %"),
        Judgement("peak_bytes>+2%", HOSTILE, "not judged", "the hosts differ"),
    )
    return Comparison("base", "new", ("the hosts differ",), ("ar is in NEW only",), cells, judgements)


def test_markdown_shows_the_checks_first_and_nothing_becomes_markup(found: Comparison) -> None:
    text = written.markdown(found)
    assert text.startswith("### Speculative decoding: 1 of 3 checks regressed\n")
    assert "| **REGRESSED** |" in text
    assert "<b>" not in text
    assert "- Absolute figures are not compared: the hosts differ." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(line.replace("\\|", "").split("|")) for line in rows} == {6, 8}


def test_junit_counts_and_explains(found: Comparison) -> None:
    (suite,) = ElementTree.fromstring(written.junit(found))
    assert {name: suite.get(name) for name in ("tests", "failures", "skipped")} == {
        "tests": "3",
        "failures": "1",
        "skipped": "1",
    }
    failure, skipped = (suite.find(f"testcase/{kind}") for kind in ("failure", "skipped"))
    assert failure is not None
    assert failure.get("message") == "-25.00 %"
    assert skipped is not None
    assert skipped.get("message") == "the hosts differ"


def test_json_for_github_action_benchmark_is_one_list_for_each_direction(found: Comparison) -> None:
    more, less = (json.loads(written.action_benchmark(found, better)) for better in ("more", "less"))
    assert [(entry["unit"], entry["value"]) for entry in more] == [("tokens/pass", 1.5), ("x", 1.4)]
    assert [(entry["unit"], entry["value"]) for entry in less] == [("bytes", 2**30)]
    assert all(set(entry) == {"name", "unit", "value", "extra"} for entry in more + less)


def test_json_for_bencher_is_benchmark_measure_value(found: Comparison) -> None:
    assert json.loads(written.bencher(found)) == {
        HOSTILE: {"tau": {"value": 1.5}, "speedup": {"value": 1.4}, "peak-bytes": {"value": 2**30}}
    }


def test_all_files_are_written(found: Comparison, tmp_path: Path) -> None:
    paths = written.write(found, tmp_path / "new" / "folder")
    assert sorted(path.name for path in paths) == sorted(written.FILES)
    assert all(path.stat().st_size > 10 for path in paths)


def test_the_terminal_gathers_what_was_not_judged_by_its_reason(found: Comparison) -> None:
    lines = [line for _, line in written.gathered(found)]
    assert lines[1:] == ["ok: speedup<-5%: 1 cell", "not judged: peak_bytes>+2%: 1 cell: the hosts differ"]
