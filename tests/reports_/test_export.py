"""Charts and tables as files: whole, escaped in their own way, and the same numbers in every form."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from factory import cell, run, trial

from harness.metrics import summary
from harness.results import Run
from reports import export, told

HOSTILE = r"a&b_c%d$e#f{g}~h^i\j<k>"


def small_run() -> Run:
    trials = [
        trial(
            cell(name, label=label),
            committed,
            seconds,
            round=index,
            prompt_id=prompt,
            category=prompt,
            synthetic=True,
        )
        for index in range(2)
        for prompt in ("writing", "code")
        for name, label, committed, seconds in (("ar", "ar", [1] * 4, 0.1), ("s3d", HOSTILE, [2, 2], 0.11))
    ]
    return run(*trials)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export")
    of = small_run()
    assert export.export(of, summary(of), out) == []
    return out


def test_every_chart_is_a_whole_svg_and_png(folder: Path) -> None:
    names = {path.stem for path in folder.glob("*.svg")}
    assert names == {path.stem for path in folder.glob("*.png")} == {"scatter", "categories", "acceptance", "tau"}
    for path in folder.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in folder.glob("*.png"))


def test_csv_and_parquet_hold_the_programs_numbers(folder: Path) -> None:
    rows = summary(small_run())
    for read, name in ((pd.read_csv, "results.csv"), (pd.read_parquet, "results.parquet")):
        frame = read(folder / name)
        assert frame.method.tolist() == ["ar", HOSTILE]
        assert frame.tau.tolist() == [row.tau for row in rows]
        assert frame.decode_tokens_per_second.tolist() == pytest.approx([row.decode_tokens_per_second for row in rows])
    assert len(pd.read_csv(folder / "trials.csv")) == 8
    assert pd.read_csv(folder / "categories.csv").category.tolist() == ["writing", "code"]
    assert pd.read_csv(folder / "acceptance.csv").depth.max() == 4


def test_latex_keeps_a_label_as_text(folder: Path) -> None:
    text = (folder / "results.tex").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith(r"a\&b"))
    assert line.startswith(r"a\&b\_c\%d\$e\#f\{g\}\textasciitilde{}h\textasciicircum{}i\textbackslash{}j\textless{}k")
    assert len(re.findall(r"(?<!\\)&", line)) == 7
    assert text.count("rule") == 3, "booktabs' top, middle and bottom"
    assert "SYNTHETIC" in text


def test_without_pyarrow_the_rest_is_written_and_the_remedy_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    of = small_run()
    (line,) = export.export(of, summary(of), tmp_path)
    assert "pip install" in line
    assert (tmp_path / "results.csv").is_file()
    assert not list(tmp_path.glob("*.parquet"))


def test_json_has_the_answer_and_a_row_a_cell() -> None:
    of = small_run()
    (read,) = json.loads(told.as_json([of], [summary(of)]))
    assert read["answers"][0].startswith("SYNTHETIC: in 32 bits")
    assert [row["method"] for row in read["rows"]] == [HOSTILE, "ar"], "fastest first"
    assert read["rows"][0]["speedup_low"] <= read["rows"][0]["speedup"] <= read["rows"][0]["speedup_high"]
    assert read["rows"][1]["speedup"] is None
