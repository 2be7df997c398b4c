"""Answers for somebody else's judge, in FastChat's files: `question.jsonl` and `model_answer/<cell>.jsonl`.

Scoring tasks is not ours. Answers are those of the first round. A second turn follows the first answer that all cells
of a run share (the base weights' own), not the method's: for a lossless method that is the same text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.results import Run, Trial


def write(run: Run, directory: Path) -> list[Path]:
    """The files, in a directory that is made. Raises UserError for a run without texts."""
    answers = {id: list(_answers(id, trials)) for id, trials in _by_cell(run).items()}
    if not answers:
        raise UserError(f"{run.directory} has no finished answer with its text: there is nothing for a judge")
    (directory / "model_answer").mkdir(parents=True, exist_ok=True)
    files = {directory / "model_answer" / f"{id}.jsonl": lines for id, lines in answers.items()}
    if questions := list(_questions(run)):
        files[directory / "question.jsonl"] = questions
    for path, lines in files.items():
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return list(files)


def _by_cell(run: Run) -> dict[str, list[Trial]]:
    """Good trials with a text, the first of each turn."""
    first = {
        (t.cell.id, t.prompt_id, t.turn): t for t in reversed(run.rows) if t.outcome == "ok" and t.text is not None
    }
    found: dict[str, list[Trial]] = {}
    for trial in reversed(first.values()):
        found.setdefault(trial.cell.id, []).append(trial)
    return found


def _answers(id: str, trials: list[Trial]) -> Iterator[dict[str, Any]]:
    """One line a prompt whose turns were all answered."""
    prompts: dict[str, dict[int, Trial]] = {}
    for trial in trials:
        prompts.setdefault(trial.prompt_id, {})[trial.turn] = trial
    for prompt_id, turns in prompts.items():
        if set(turns) == set(range(len(turns))):
            yield {
                "question_id": _question_id(prompt_id),
                "answer_id": f"{id}/{prompt_id}",
                "model_id": id,
                "choices": [{"index": 0, "turns": [turns[index].text for index in range(len(turns))]}],
                "tstamp": turns[0].started_unix_seconds or 0.0,
            }


def _questions(run: Run) -> Iterator[dict[str, Any]]:
    """From the plan, which holds the prompts; nothing where the run's directory has none."""
    path = run.directory / "plan.json"
    if path.is_file():
        for prompt in json.loads(path.read_bytes())["prompt_set"]["prompts"]:
            id, category = _question_id(prompt["id"]), prompt["category"]
            yield {"question_id": id, "category": category, "turns": prompt["turns"]}


def _question_id(prompt_id: str) -> int | str:
    """FastChat sorts by number where it can."""
    return int(prompt_id) if prompt_id.isdigit() else prompt_id
