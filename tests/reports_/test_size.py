"""Large runs: the page stays small and quick to make, and opens."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import chromium
import msgspec
import pytest
from factory import cell, run, trial

from harness.results import write_manifest

CPU_SECONDS = 10.0
"4.5 of a quiet machine's; tests share theirs"
MOST_BYTES = 6_000_000


def large_run(directory: Path, trials: int) -> Path:
    """34 cells of two targets on 60 prompts in 12 categories, in as many rounds as it takes."""
    rng = random.Random(0)
    cells = [
        cell(name, label=f"{name}:n={n}" if name != "ar" else name, bits=bits)
        for bits in ("16", "nf4")
        for n in range(4)
        for name in ("s3d", "eagle", "medusa", "layerskip", *(("ar",) if n == 0 else ()))
    ]
    rounds = -(-trials // (len(cells) * 60))
    made = []
    for of in cells:
        for index in range(rounds):
            for prompt in range(60):
                committed = [1] * 64 if of.method == "ar" else rng.choices((1, 2, 3, 5), k=32)
                count = sum(committed) + 1
                one = trial(
                    of,
                    committed,
                    0.01 + 0.001 * rng.random(),
                    round=index,
                    prompt_id=f"p{prompt}",
                    category=f"category {prompt % 12}",
                    tokens=rng.choices(range(49_000), k=count),
                    token_texts=[f" word{n}" for n in range(count)] if index == 0 else None,
                    rejected=[[" a", " b"]] * len(committed) if index == 0 else None,
                )
                made.append(one)
    directory.mkdir(exist_ok=True)
    write_manifest(directory, run(*made, rounds=rounds).manifest)
    (directory / "trials.jsonl").write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in made))
    return directory


def report(directory: Path) -> tuple[Path, float]:
    """The page of a run, made in a process of its own, and that process's CPU seconds."""
    before = os.times()
    command = [sys.executable, "-m", "harness", "report", str(directory)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    after = os.times()
    took = after.children_user + after.children_system - before.children_user - before.children_system
    return directory / "report.html", took


def test_ten_thousand_trials_are_seconds_and_a_few_megabytes(tmp_path: Path) -> None:
    page, seconds = report(large_run(tmp_path / "run", 10_000))
    assert page.stat().st_size < MOST_BYTES
    assert seconds < CPU_SECONDS


@pytest.mark.slow
def test_a_hundred_thousand_trials_open(tmp_path: Path) -> None:
    page, _ = report(large_run(tmp_path / "run", 100_000))
    assert page.stat().st_size < MOST_BYTES
    with chromium.browser() as browser:
        opened = browser.new_page()
        opened.goto(page.as_uri(), wait_until="load")
        assert opened.locator("form.filters output").text_content() == "34 of 34 rows"
