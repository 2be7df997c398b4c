"""Profiles of acceptance, and verdicts drawn from them: what was said, what is expected, what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import bench
import factory
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

from harness.acceptance import SPEC_BENCH, Acceptance, Profile, constant_chance, expected_tau, read
from harness.decode import Limits, decode
from harness.draft import Draft, dynamic_tree, nothing, point_chain, tree
from harness.drawn import DrawnVerdicts
from harness.errors import UserError
from harness.results import append_trial, write_manifest
from harness.target import Target
from harness.verify import verify

CPU = torch.device("cpu")
ROUNDS = 4000
FIVE_SIGMA = 5 * 0.5 / ROUNDS**0.5
"a share over ROUNDS draws is further off than this once in 1.7 million"


def test_the_last_chance_holds_for_all_deeper_ones() -> None:
    profile = read("0.7,0.5").of("s3d", "s3d", {})
    assert profile is not None
    assert profile.by_depth(4) == (0.7, 0.5, 0.5, 0.5)
    assert profile.by_depth(1) == (0.7,)


@bench.steady
@given(st.floats(1.0, 6.0), st.integers(1, 8))
def test_a_constant_chance_gives_the_tau_asked_for_where_any_does(tau: float, depths: int) -> None:
    chance = constant_chance(tau, depths)
    assert chance is not None
    assert expected_tau([chance] * depths) == pytest.approx(min(tau, depths + 1), abs=1e-9)


def test_published_figures_are_each_methods_own_or_one_for_all() -> None:
    own = read("published:spec-bench")
    assert own.of("medusa:nodes=60", "medusa", {"nodes": 60}) == Profile(tau=SPEC_BENCH["medusa"])
    assert own.of("eagle:nodes=59", "eagle", {"nodes": 59}) == Profile(tau=SPEC_BENCH["eagle-2"])
    assert own.of("eagle", "eagle", {"nodes": 0}) is None, "no figure of a chain was published"
    assert own.of("s3d", "s3d", {}) is None
    chain = Acceptance(said="from:run", by_label={"s3d": Profile(tau=2.0)})
    assert chain.of("s3d:nodes=32", "s3d", {"nodes": 32, "tree": "dynamic"}) is None, "nor is a chain's a tree's"
    assert read("published:eagle-2").of("s3d", "s3d", {}) == Profile(tau=4.34)


def test_a_runs_own_acceptance_is_taken_by_label_then_by_method(tmp_path: Path) -> None:
    trial = factory.trial(factory.cell("s3d"), [3, 1, 2, 5])
    write_manifest(tmp_path, factory.run(trial).manifest)
    append_trial(tmp_path / "trials.jsonl", trial)
    found = read(f"from:{tmp_path}")
    assert found.of("s3d:k=2", "s3d", {}) == Profile(chances=(3 / 4, 2 / 3, 1 / 2, 1.0))
    assert found.of("medusa", "medusa", {}) is None


def test_a_synthetic_run_is_no_source(tmp_path: Path) -> None:
    trial = factory.trial(factory.cell("s3d"), [3, 1], synthetic=True)
    write_manifest(tmp_path, factory.run(trial).manifest)
    append_trial(tmp_path / "trials.jsonl", trial)
    with pytest.raises(UserError, match="drawn"):
        read(f"from:{tmp_path}")


@pytest.mark.parametrize(
    "text", ["", "0.7,,0.5", "1.5", "-0.1", "nan", "tau:0.5", "tau:x", "tau:inf", "published:s3d", "from:/no"]
)
def test_a_mistake_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as error:
        read(text)
    assert "\n" not in str(error.value)


# --- verdicts --------------------------------------------------------------------------------------------------------


def accepted(draft: Draft, profile: Profile, seed: int = 0, rounds: int = ROUNDS) -> list[list[int]]:
    """Accepted nodes of each round."""
    redraw = DrawnVerdicts(profile, rounds, CPU)
    redraw.seed(seed)
    logits_MV = torch.randn(len(draft) + 1, 16)
    judged = verify(draft, logits_MV, bench.sampler())
    return [redraw(bench.Direct(), draft, judged).host().nodes for _ in range(rounds)]


def shares(counts: Sequence[int], depths: int) -> list[float]:
    """How often each depth was accepted where the one above was."""
    reached = [sum(count >= depth for count in counts) for depth in range(depths + 1)]
    return [below / above for above, below in pairwise(reached)]


def test_a_chain_is_accepted_as_often_as_was_said() -> None:
    nodes = accepted(point_chain([1, 2, 3], CPU), Profile(chances=(0.7, 0.6, 0.5)))
    assert all(each == list(range(1, len(each) + 1)) for each in nodes)
    first, second, third = shares([len(each) for each in nodes], 3)
    assert first == pytest.approx(0.7, abs=FIVE_SIGMA)
    assert second == pytest.approx(0.6, abs=FIVE_SIGMA / 0.7**0.5)
    assert third == pytest.approx(0.5, abs=FIVE_SIGMA / 0.42**0.5)


def test_what_a_tree_accepts_is_a_path_from_its_root() -> None:
    parents = (0, 0, 1, 1, 3)
    static = Draft(torch.arange(5), tree(parents, CPU))
    dynamic = Draft(torch.arange(5), dynamic_tree(torch.tensor(parents), 4))
    for draft in (static, dynamic):
        nodes = accepted(draft, Profile(chances=(0.8,)), rounds=400)
        assert {tuple(each) for each in nodes} == {(), (1,), (1, 3), (1, 3, 5)}


def test_a_seed_repeats_the_draws_and_another_gives_others() -> None:
    draft = point_chain([1, 2, 3], CPU)
    one, again, other = (accepted(draft, Profile(tau=2.0), seed, 50) for seed in (1, 1, 2))
    assert one == again != other


def test_nothing_drafted_is_judged_as_ever() -> None:
    redraw = DrawnVerdicts(Profile(chances=(1.0,)), 10, CPU)
    judged = verify(nothing(CPU), torch.randn(1, 16), bench.sampler())
    assert redraw(bench.Direct(), nothing(CPU), judged) is judged
    assert redraw.chances == []


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_the_loop_takes_a_drawn_verdict_for_the_targets_own(chance: float) -> None:
    """Drafts of prompt lookup over a text that repeats: all accepted, or none."""
    target = Target(tiny("llama"), capacity=bench.CAPACITY)
    method = bench.load("prompt-lookup", target, None, gamma=3)
    prompt, limits = bench.text(20, 128) * 2, Limits(24)
    redraw = DrawnVerdicts(Profile(chances=(chance,)), 24, CPU)
    _, *steps = decode(target, method, prompt, limits, bench.sampler(), redraw)
    assert any(step.drafted for step in steps)
    assert all(step.accepted == chance * step.drafted for step in steps)
    assert sum(len(step.committed) for step in steps) == 23
