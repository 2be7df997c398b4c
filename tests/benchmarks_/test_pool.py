"""The pool: draws are disjoint, a planted slow-down is flagged and nothing else; in a simulated pool, which says so."""

from __future__ import annotations

from pathlib import Path

import bench
import factory
import numpy as np
import pytest
from factory import cell, trial
from tiny import VOCAB, tiny

from benchmarks import planted, pool
from harness.decode import Limits
from harness.results import Run
from harness.target import Target


@pytest.fixture(scope="module")
def simulated() -> Run:
    """Forty rounds with process noise of 1 %; the slowed decoder takes 5 % longer."""
    rng = np.random.default_rng(0)
    trials = []
    for index in range(40):
        for label, seconds in (("ar", 0.1), (pool.PLAIN, 0.08), (pool.SLOWED, 0.08 * 1.05)):
            own = seconds * float(np.exp(rng.normal(0, 0.01)))
            of = cell("ar") if label == "ar" else cell("burning", label=label)
            trials += [trial(of, [1] * 4, own, round=index, prompt_id=f"p{number}", depth=0) for number in range(2)]
    return factory.run(*trials, host={"cpu": "simulated"})


def test_the_two_sides_of_a_comparison_share_no_round() -> None:
    for base, new in pool.draws(40, 20, 50, seed=1):
        assert sorted((*base, *new)) == list(range(40))
    assert list(pool.draws(40, 5, 3, seed=1)) == list(pool.draws(40, 5, 3, seed=1))


def test_what_was_planted_is_flagged_and_nothing_else(simulated: Run) -> None:
    found = {(one.kind, one.metric, one.rounds): one for one in pool.judged(simulated, comparisons=20, seed=0)}
    assert {key[1:] for key in found} == {(metric, size) for metric in ("speedup", "pass_cost") for size in (5, 10, 20)}
    assert {key[0] for key in found} == {"A/A", "slowed 5%"}
    for (kind, _, size), one in found.items():
        if kind == "A/A":
            assert one.flagged <= 3
        elif size >= 10:
            assert one.flagged == 20
    for metric in ("speedup", "pass_cost"):
        assert found["A/A", metric, 20].width < found["A/A", metric, 5].width < 0.1


def test_the_planted_decoder_keeps_the_text_and_burns_time() -> None:
    target = Target(tiny("llama"), capacity=bench.CAPACITY)
    prompt, limits = bench.text(12, VOCAB), Limits(30)
    made = planted.Burning(target, planted.BurningOptions(share=0.5))
    text, _ = bench.decoded(target, made, prompt, limits)
    assert text == target.generate(prompt, 30, frozenset())


def test_the_entry_point_names_the_decoder(tmp_path: Path) -> None:
    planted.write_entry_point(tmp_path)
    written = (tmp_path / "planted_decoders-1.0.dist-info" / "entry_points.txt").read_text()
    assert "burning = benchmarks.planted:Burning" in written
