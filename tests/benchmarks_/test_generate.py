"""transformers' own generate beside a run: what stands beside what; in float32 the texts are the baseline's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import factory
import msgspec
import pytest
from factory import cell, failed, trial

from benchmarks import generate
from harness import cli
from harness.errors import UserError
from harness.results import read_run


def test_the_last_whole_round_stands_beside() -> None:
    seconds = {0: 0.4, 1: 0.2, 2: 0.1}
    trials = [
        trial(cell(name), [1] * 4, pace * (2 if name == "ar" else 1), round=index, prompt_id=prompt)
        for index, pace in seconds.items()
        for prompt in ("p0", "p1")
        for name in ("ar", "s3d")
        if (index, prompt, name) != (2, "p1", "s3d")
    ]
    run = factory.run(*trials, failed(cell("s3d"), round=2, prompt_id="p1"))
    found = {label: speed for label, _, speed in generate.beside(run, {"p0", "p1"})}
    assert found["ar"] == pytest.approx(5 / (0.2 + 4 * 0.2)), "round 2"
    assert found["s3d"] == pytest.approx(5 / (0.2 + 4 * 0.2)), "round 1: its last one lacks an answer"


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"synthetic": True}, "SYNTHETIC"), ({"temperature": 1.0}, "sampled"), ({}, "no answer of `ar`")],
)
def test_what_nothing_can_stand_beside_says_so(changes: dict[str, object], why: str) -> None:
    method = "s3d" if not changes else "ar"
    run = factory.run(trial(cell(method), synthetic=bool(changes.get("synthetic"))), **changes)
    with pytest.raises(UserError, match=why):
        generate.first_answers(run)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_in_float32_its_texts_are_the_baselines(cache: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["run", "--methods", "ar", "--bits", "32", "--prompts", "quick", "--limit", "2", "--max-new-tokens", "8"]
    assert cli.main([*command, "--device", "cpu", "--out", str(out)]) == 0
    run = read_run(out)
    found = generate.measured(run, generate.first_answers(run), cache)
    assert [answer.identical for answer in found.answers] == [True, True]
    assert found.tokens_per_second > 0
    cut = replace(run, rows=tuple(msgspec.structs.replace(one, new_tokens=[1]) for one in run.rows))
    assert not any(answer.identical for answer in generate.measured(cut, generate.first_answers(cut), cache).answers)
