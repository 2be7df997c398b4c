"""Verification on bare tensors: greedy against a slow reference, sampling against the target's exact distribution.

The sampling tests draw whole texts from a small Markov chain P, where p after a token is P's row, and compare them with
the chain's exact probabilities by chi-square. Each has a false-alarm rate of FALSE_ALARM; seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench import Direct, steady
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.acceptance import Profile
from harness.draft import Draft, Drawn, chain, nothing, tree
from harness.drawn import DrawnVerdicts
from harness.sampling import Sampler
from harness.verify import Typical, verify, verify_greedy, verify_sampled, verify_typical

CPU = torch.device("cpu")
FALSE_ALARM = 1e-6
DRAWS = 100_000
V = 4

# --- greedy -----------------------------------------------------------------------------------------------------------


@st.composite
def scored_trees(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], list[int]]:
    """(parents, tokens of the nodes, the target's argmax at every scored position); siblings are distinct."""
    size = draw(st.integers(0, 10))
    parents = tuple(draw(st.integers(0, node)) for node in range(size))
    tokens: list[int] = []
    for node in range(size):
        taken = {tokens[other] for other in range(node) if parents[other] == parents[node]}
        tokens.append(draw(st.sampled_from([token for token in range(12) if token not in taken])))
    best = [draw(st.integers(0, 3)) for _ in range(size + 1)]
    return parents, tokens, best


def walked(parents: tuple[int, ...], tokens: list[int], best: list[int]) -> tuple[list[int], int]:
    """The slow way: follow the target's choice down the tree until no child has it."""
    at, path = 0, []
    while True:
        children = [
            node
            for node, (parent, token) in enumerate(zip(parents, tokens, strict=True), start=1)
            if parent == at and token == best[at]
        ]
        if not children:
            return path, best[at]
        at = children[0]
        path.append(at)


def one_hot(best: list[int], vocabulary: int = 12) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(best), vocabulary).float()


@steady
@given(scored_trees())
def test_greedy_follows_the_targets_choices_down_the_tree(case: tuple[tuple[int, ...], list[int], list[int]]) -> None:
    parents, tokens, best = case
    draft = Draft(torch.tensor(tokens, dtype=torch.long), tree(parents, CPU))
    verdict = verify_greedy(draft, one_hot(best))
    path, bonus = walked(parents, tokens, best)
    assert verdict.host()[:3] == (path, [tokens[node - 1] for node in path], bonus)
    assert int(verdict.last) == (path[-1] if path else 0)
    assert int(verdict.count) == len(path)


@steady
@given(scored_trees())
def test_sampling_at_almost_no_temperature_decides_as_greedy_does(
    case: tuple[tuple[int, ...], list[int], list[int]],
) -> None:
    parents, tokens, best = case
    draft = Draft(torch.tensor(tokens, dtype=torch.long), tree(parents, CPU))
    sampler = Sampler(1e-3, 1.0, torch.Generator().manual_seed(0))
    assert verify(draft, one_hot(best), sampler).host() == verify_greedy(draft, one_hot(best)).host()


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_padding_of_short_paths_is_never_accepted(temperature: float) -> None:
    """Token 0 is what padding looks like: the target chooses it everywhere, the draft offers it only off the path."""
    parents = (0, 0, 1, 3, 2)  # 1 - 3 - 4 is long, 2 - 5 is short
    draft = Draft(torch.tensor([7, 0, 0, 0, 0]), tree(parents, CPU))
    sampler = Sampler(temperature, 1.0, torch.Generator().manual_seed(0))
    nodes, tokens, bonus, _ = verify(draft, one_hot([0] * 6), sampler).host()
    assert (nodes, tokens, bonus) == ([2, 5], [0, 0], 0)
    nodes, tokens, bonus, _ = verify(draft, one_hot([3] * 6), sampler).host()
    assert (nodes, tokens, bonus) == ([], [], 3)


def test_an_empty_draft_gives_the_targets_next_token() -> None:
    assert verify(nothing(CPU), one_hot([5]), Sampler()).host() == ([], [], 5, 0)
    sampler = Sampler(1e-3, 1.0, torch.Generator().manual_seed(0))
    assert verify(nothing(CPU), one_hot([5]), sampler).host() == ([], [], 5, 0)


# --- sampling ---------------------------------------------------------------------------------------------------------

P = torch.softmax(1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(2)), dim=-1)
"the target: P[a] is what follows a"
Q = torch.softmax(1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(5)), dim=-1)
"the draft: unlike the target, and sure of itself"
ROOT = 1
LENGTH = 3
Drafting = Callable[[Sampler], Draft]


class Batched(Sampler):
    """A sampler that vmap can batch: its noise comes from the global generator, made rather than filled in."""

    def draw(self, p_MV: Tensor) -> Tensor:
        return (p_MV / -torch.rand(p_MV.shape).log()).argmax(-1)


def texts(drafting: Drafting, rule: Callable[[Draft, Tensor, Sampler], object] = verify_sampled) -> Tensor:
    """DRAWS texts of LENGTH tokens, (DRAWS, LENGTH): one verified round, and the rest from the target itself."""
    sampler = Batched(temperature=1.0)

    def one(_: Tensor) -> Tensor:
        draft = drafting(sampler)
        tokens_M = torch.cat((torch.tensor([ROOT]), draft.tokens_N))
        verdict = rule(draft, P[tokens_M], sampler)
        said = torch.cat((verdict.tokens_K, torch.zeros(LENGTH + 1, dtype=torch.long)))  # type: ignore[attr-defined]
        said = torch.where(torch.arange(len(said)) == verdict.count, verdict.bonus, said)  # type: ignore[attr-defined]
        for place in range(1, LENGTH):
            more = sampler.draw(P[said[place - 1]].view(1, -1))[0]
            said = torch.where((torch.arange(len(said)) == place) & (place > verdict.count), more, said)  # type: ignore[attr-defined]
        return said[:LENGTH]

    torch.manual_seed(0)
    return torch.func.vmap(one, randomness="different")(torch.zeros(DRAWS))


def p_value(texts_DL: Tensor) -> float:
    """Of the texts under the chain's own distribution, by chi-square."""
    exact = P[ROOT].double()
    for _ in range(1, LENGTH):
        exact = (exact[:, None] * P.double().repeat(exact.numel() // V, 1)).flatten()
    exact = exact / exact.sum()
    cells = (texts_DL * V ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)
    counts = torch.bincount(cells, minlength=V**LENGTH).double()
    expected = exact * len(texts_DL)
    rare = expected < 8
    counts = torch.cat((counts[~rare], counts[rare].sum().view(1)))
    expected = torch.cat((expected[~rare], expected[rare].sum().view(1)))
    return float(chi2.sf(float(((counts - expected).square() / expected).sum()), len(counts) - 1))


def drawn_chain(sampler: Sampler) -> Draft:
    first = sampler.draw(Q[ROOT].view(1, -1))
    second = sampler.draw(Q[first])
    q_PV = torch.cat((Q[ROOT].view(1, -1), Q[first]))
    return Draft(torch.cat((first, second)), chain(2, CPU), Drawn.IID, q_PV, torch.arange(2))


def best_chain(sampler: Sampler) -> Draft:
    first = Q[ROOT].argmax().view(1)
    return Draft(torch.cat((first, Q[first].argmax(-1))), chain(2, CPU))


def best_tree(sampler: Sampler) -> Draft:
    """The two likeliest children of the root, and of the first of them: a point mass each."""
    top = Q[ROOT].topk(2).indices
    return Draft(torch.cat((top, Q[top[0]].topk(2).indices)), tree((0, 0, 1, 1), CPU))


def distinct_siblings(sampler: Sampler) -> Draft:
    """Three children of the root without replacement, two of the first."""
    top = without_replacement(Q[ROOT], 3, sampler)
    below = without_replacement(Q[top[0]], 2, sampler)
    q_PV = torch.stack((Q[ROOT], Q[top[0]]))
    return Draft(
        torch.cat((top, below)),
        tree((0, 0, 0, 1, 1), CPU),
        Drawn.WITHOUT_REPLACEMENT,
        q_PV,
        torch.tensor([0, 0, 0, 1, 1]),
    )


def independent_siblings(sampler: Sampler) -> Draft:
    top = sampler.draw(Q[ROOT].repeat(3, 1))
    below = sampler.draw(Q[top[1]].repeat(2, 1))
    q_PV = torch.stack((Q[ROOT], Q[top[1]]))
    return Draft(torch.cat((top, below)), tree((0, 0, 0, 2, 2), CPU), Drawn.IID, q_PV, torch.tensor([0, 0, 0, 1, 1]))


def reduced_vocabulary(sampler: Sampler) -> Draft:
    """A draft that knows three of the four tokens, in an order of its own."""
    known = torch.tensor([3, 0, 1])
    q_1 = Q[ROOT][known] / Q[ROOT][known].sum()
    first = known[sampler.draw(q_1.view(1, -1))]
    q_2 = Q[first][:, known] / Q[first][:, known].sum()
    second = known[sampler.draw(q_2)]
    q_PV = torch.cat((q_1.view(1, -1), q_2))
    return Draft(torch.cat((first, second)), chain(2, CPU), Drawn.IID, q_PV, torch.arange(2), known)


def perfect_chain(sampler: Sampler) -> Draft:
    """q equals p, so every residual is nothing but rounding."""
    first = sampler.draw(P[ROOT].view(1, -1))
    second = sampler.draw(P[first])
    return Draft(
        torch.cat((first, second)),
        chain(2, CPU),
        Drawn.IID,
        torch.cat((P[ROOT].view(1, -1), P[first])),
        torch.arange(2),
    )


def without_replacement(q_V: Tensor, count: int, sampler: Sampler) -> Tensor:
    taken = []
    for _ in range(count):
        taken.append(sampler.draw((q_V / q_V.sum()).view(1, -1)))
        q_V = torch.where(torch.arange(V) == taken[-1], 0.0, q_V)
    return torch.cat(taken)


LOSSLESS = [
    drawn_chain, best_chain, best_tree, distinct_siblings, independent_siblings, reduced_vocabulary, perfect_chain,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, in index_copy_
@pytest.mark.parametrize("drafting", LOSSLESS, ids=lambda drafting: drafting.__name__)
def test_verified_texts_follow_the_targets_own_distribution(drafting: Drafting) -> None:
    assert p_value(texts(drafting)) > FALSE_ALARM


def argmax_scored_as_drawn(sampler: Sampler) -> Draft:
    draft = best_chain(sampler)
    q_PV = torch.stack((Q[ROOT], Q[draft.tokens_N[0]]))
    return Draft(draft.tokens_N, draft.shape, Drawn.IID, q_PV, torch.arange(2))


def top_k_scored_as_drawn(sampler: Sampler) -> Draft:
    draft = best_tree(sampler)
    q_PV = torch.stack((Q[ROOT], Q[draft.tokens_N[0]]))
    return Draft(draft.tokens_N, draft.shape, Drawn.IID, q_PV, torch.tensor([0, 0, 1, 1]))


def drawn_scored_as_point_mass(sampler: Sampler) -> Draft:
    draft = drawn_chain(sampler)
    return Draft(draft.tokens_N, draft.shape)


def distinct_scored_as_independent(sampler: Sampler) -> Draft:
    draft = distinct_siblings(sampler)
    return Draft(draft.tokens_N, draft.shape, Drawn.IID, draft.q_PV, draft.row_N)


def q_of_another_temperature(sampler: Sampler) -> Draft:
    draft = drawn_chain(sampler)
    assert draft.q_PV is not None
    q_PV = torch.softmax(draft.q_PV.log() / 2, dim=-1)
    return Draft(draft.tokens_N, draft.shape, Drawn.IID, q_PV, draft.row_N)


WRONG = [argmax_scored_as_drawn, top_k_scored_as_drawn, distinct_scored_as_independent, q_of_another_temperature]


@pytest.mark.parametrize("drafting", WRONG, ids=lambda drafting: drafting.__name__)
def test_the_common_mistakes_would_be_caught(drafting: Drafting) -> None:
    assert p_value(texts(drafting)) < FALSE_ALARM


def test_a_random_draft_may_be_verified_as_a_point_mass() -> None:
    """Lossless too, because the rule holds for every token that may be drafted; only less of it is accepted."""
    assert p_value(texts(drawn_scored_as_point_mass)) > FALSE_ALARM


def test_typical_acceptance_would_be_caught() -> None:
    def typical(draft: Draft, p_MV: Tensor, sampler: Sampler) -> object:
        return verify_typical(draft, p_MV, sampler, Typical())

    def likely(sampler: Sampler) -> Draft:
        return Draft(P[ROOT].argmax().view(1), chain(1, CPU))

    assert p_value(texts(likely)) > FALSE_ALARM
    assert p_value(texts(likely, typical)) < FALSE_ALARM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_left_to_draw_from_is_not_nan(dtype: torch.dtype) -> None:
    """p is certain of the drafted token, or equal to q: the residual is zero, whatever the uniform number says."""

    class Unlucky(Sampler):
        def uniform(self, size: int, like: Tensor) -> Tensor:
            return torch.ones(size, dtype=like.dtype)

    sampler = Unlucky(1.0, 1.0, torch.Generator().manual_seed(0))
    certain = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=dtype)
    rejected = verify_sampled(Draft(torch.tensor([1]), chain(1, CPU)), certain, sampler).host()
    assert rejected == ([], [], 1, 1)
    even = torch.full((2, 3), 1 / 3, dtype=dtype)
    for drawn in (Drawn.IID, Drawn.WITHOUT_REPLACEMENT):
        draft = Draft(torch.tensor([1, 2]), tree((0, 0), CPU), drawn, even[:1], torch.tensor([0, 0]))
        _, _, bonus, _ = verify_sampled(draft, even.repeat(2, 1)[:3], sampler).host()
        assert bonus in (0, 1, 2)


class Brought(TorchDispatchMode):
    """Counts values that are brought to the host."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("drafting", [best_chain, drawn_chain, distinct_siblings, independent_siblings])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_verdict_brings_nothing_to_the_host_by_itself(drafting: Drafting, temperature: float) -> None:
    sampler = Sampler(temperature, 1.0, torch.Generator())
    draft = drafting(Sampler(1.0, 1.0, torch.Generator()))
    logits_MV = torch.randn(len(draft) + 1, V)
    typical = verify_typical if temperature else None
    redraw = DrawnVerdicts(Profile(chances=(0.5,)), 4, torch.device("cpu"))
    redraw(Direct(), draft, verify(draft, logits_MV, sampler))
    with Brought() as brought:
        redraw(Direct(), draft, verify(draft, logits_MV, sampler))
        if typical:
            typical(draft, torch.softmax(logits_MV, -1), sampler, Typical())
    assert brought.count == 0
    with Brought() as brought:
        logits_MV[0][torch.tensor(1)]
    assert brought.count == 1, "what is counted is what a careless index does"


def test_typical_acceptance_is_medusas_rule() -> None:
    """Section 3.3.2: p(x) > min(epsilon, delta * exp(-entropy)), on every node of the path."""
    p_MV = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]])
    entropy = float(-(p_MV[0] * p_MV[0].log()).sum())
    threshold = min(0.3, 0.9 * 2.718281828**-entropy)
    assert 0.2 < threshold < 0.7
    sampler = Sampler(1.0, 1.0, torch.Generator().manual_seed(0))
    for token, accepted in ((0, True), (1, False), (2, False)):
        verdict = verify_typical(Draft(torch.tensor([token]), chain(1, CPU)), p_MV[:2], sampler, Typical(0.3, 0.9))
        assert bool(verdict.count) == accepted
    both = verify_typical(Draft(torch.tensor([0, 1]), chain(2, CPU)), p_MV, sampler, Typical())
    assert both.host().nodes == [1, 2]
