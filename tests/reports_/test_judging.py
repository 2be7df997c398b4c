"""Answers in FastChat's files: whole conversations, one file a cell, and the questions beside them."""

from __future__ import annotations

import json
from pathlib import Path

import factory
import pytest
from factory import cell, failed, trial

from harness.cli import main
from harness.errors import UserError
from harness.results import append_trial, write_manifest
from reports.judging import write


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_conversation_is_a_line_with_all_its_turns(tmp_path: Path) -> None:
    trials = [
        trial(cell("s3d"), prompt_id=prompt, turn=turn, round=index, text=f"{prompt}.{turn}.{index}")
        for index in (0, 1)
        for prompt, turn in (("81", 0), ("81", 1), ("writing-01", 0))
    ]
    incomplete = trial(cell("s3d"), prompt_id="82", turn=1, text="and then")
    run = factory.run(*trials, incomplete, failed(cell("s3d"), prompt_id="82"), directory=tmp_path / "run")
    (path,) = write(run, tmp_path / "out")
    assert path == tmp_path / "out" / "model_answer" / "s3d-32-float32-base-eager-cuda.jsonl"
    first, second = lines(path)
    assert (first["question_id"], second["question_id"]) == (81, "writing-01")
    assert first["choices"] == [{"index": 0, "turns": ["81.0.0", "81.1.0"]}]
    assert set(first) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}


def test_the_command_writes_answers_and_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = factory.run(trial(cell("ar")), trial(cell("s3d")))
    write_manifest(tmp_path, run.manifest)
    for row in run.rows:
        append_trial(tmp_path / "trials.jsonl", row)
    prompt = {"id": "p0", "category": "writing", "turns": ["Hi."]}
    (tmp_path / "plan.json").write_text(json.dumps({"prompt_set": {"prompts": [prompt]}}))
    assert main(["report", str(tmp_path), "--judge-export", str(tmp_path / "judge")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert lines(tmp_path / "judge" / "question.jsonl") == [
        {"question_id": "p0", "category": "writing", "turns": ["Hi."]}
    ]


def test_a_run_without_texts_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing for a judge"):
        write(factory.run(failed(cell("s3d"))), tmp_path / "out")
    assert not (tmp_path / "out").exists()
