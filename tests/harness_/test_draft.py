"""Trees: what their shape says about them, and that the device builds the same shape as the host."""

from __future__ import annotations

import pytest
import torch
from bench import steady
from hypothesis import given
from hypothesis import strategies as st

from harness.draft import (
    LikeliestTree,
    RankedTree,
    best_of,
    best_paths,
    chain,
    dynamic_tree,
    likeliest_columns,
    nothing,
    point_chain,
    tree,
)

CPU = torch.device("cpu")


@st.composite
def parent_lists(draw: st.DrawFn, most: int = 12) -> tuple[int, ...]:
    size = draw(st.integers(0, most))
    return tuple(draw(st.integers(0, node)) for node in range(size))


def path(parents: tuple[int, ...], node: int) -> list[int]:
    """The slow way: a node and everything above it, the root last."""
    return [node] if node == 0 else [node, *path(parents, parents[node - 1])]


@steady
@given(parent_lists())
def test_ancestors_and_depth_are_those_of_walking_up(parents: tuple[int, ...]) -> None:
    shape = tree(parents, CPU)
    for node in range(len(parents) + 1):
        above = path(parents, node)
        assert shape.ancestors_MM[node].nonzero().flatten().tolist() == sorted(above)
        assert int(shape.depth_M[node]) == len(above) - 1
    assert shape.longest == int(shape.depth_M.max())


@steady
@given(parent_lists(), st.integers(0, 3))
def test_a_tree_built_on_the_device_equals_the_static_one(parents: tuple[int, ...], slack: int) -> None:
    static = tree(parents, CPU)
    built = dynamic_tree(torch.tensor(parents, dtype=torch.long), static.longest + slack)
    assert torch.equal(built.parents_M, static.parents_M)
    assert torch.equal(built.depth_M, static.depth_M)
    assert torch.equal(built.ancestors_MM, static.ancestors_MM)


@steady
@given(st.integers(0, 8))
def test_a_chain_needs_no_mask_because_it_is_the_lower_triangle(length: int) -> None:
    shape = chain(length, CPU)
    assert shape.chain
    assert torch.equal(shape.ancestors_MM, torch.ones(length + 1, length + 1).tril().bool())


@steady
@given(parent_lists())
def test_only_a_path_calls_itself_a_chain(parents: tuple[int, ...]) -> None:
    assert tree(parents, CPU).chain == (parents == tuple(range(len(parents))))


@pytest.mark.parametrize("parents", [(1,), (0, 2), (0, -1)])
def test_a_parent_after_its_child_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="before their children"):
        tree(parents, CPU)


def test_drafts_of_no_randomness() -> None:
    assert len(nothing(CPU)) == 0
    assert point_chain([5, 6, 7], CPU).tokens_N.tolist() == [5, 6, 7]
    assert len(point_chain([], CPU)) == 0


@pytest.mark.parametrize("width", [5, 128, 384, 1000, 1024, 32_000])
def test_the_best_of_a_wide_row_are_those_of_topk(width: int) -> None:
    scores_RV = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    best_RC, place_RC = best_of(scores_RV, 5)
    expected = scores_RV.topk(5, dim=-1)
    assert torch.equal(best_RC, expected.values)
    assert torch.equal(place_RC, expected.indices)


def test_the_likeliest_guesses_are_those_of_trying_all() -> None:
    logits_KV = 3 * torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    rows_KR, log_q_KR = likeliest_columns(logits_KV, 4)
    assert torch.equal(log_q_KR, logits_KV.log_softmax(-1).gather(1, rows_KR))
    every = best_paths([[0.4, 0.3, 0.2, 0.1]] * 3, 4 + 16 + 64)
    chances = {path: sum(float(log_q_KR[i, rank]) for i, rank in enumerate(path)) for path in every}
    for nodes in (1, 2, 10, 60):
        draft = LikeliestTree(RankedTree.of(every, CPU), nodes).draft(logits_KV, lambda rows: rows + 100)
        kept = sorted(sorted(every, key=lambda path: -chances[path])[:nodes], key=lambda path: (len(path), path))
        expected = RankedTree.of(kept, CPU)
        assert draft.tokens_N.tolist() == [100 + int(rows_KR[len(path) - 1, path[-1]]) for path in kept]
        for name in ("parents_M", "depth_M", "ancestors_MM"):
            assert torch.equal(getattr(draft.shape, name), getattr(expected.shape, name))
        assert expected.shape.longest <= draft.shape.longest <= nodes


@pytest.mark.parametrize("certain", [0.0, -torch.inf])
def test_of_a_parent_and_a_child_as_likely_the_parent_is_kept(certain: float) -> None:
    """More of them than torch sorts by insertion, and every chance the same."""
    logits_KV = torch.tensor([[1000.0, certain]]).expand(300, 2).contiguous()
    whole = RankedTree.of([(0,) * depth for depth in range(1, 301)], CPU)
    draft = LikeliestTree(whole, 5).draft(logits_KV, lambda rows: rows)
    assert draft.shape.parents_M.tolist() == [0, 0, 1, 2, 3, 4]
    assert torch.equal(draft.shape.ancestors_MM, torch.ones(6, 6, dtype=torch.bool).tril())
