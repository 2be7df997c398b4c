"""Verification: how far a scored draft is accepted, and which token follows. Pure tensors, no host synchronisation.

Greedy: the deepest path whose tokens equal the target's argmax. Sampling: recursive rejection, which leaves the
target's distribution unchanged (chain: Leviathan et al. 2023, Chen et al. 2023; siblings: SpecInfer, Sequoia). Typical
acceptance (Medusa, section 3.3.2) is the one lossy rule. Shape letters are those of `harness.draft`; p is the target, q
the draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from harness.cache import Compiled, as_it_is
from harness.draft import Draft, Drawn
from harness.sampling import Sampler


class Accepted(NamedTuple):
    """A verdict on the host: accepted nodes (scored positions, no root), their tokens and the one that follows."""

    nodes: list[int]
    tokens: list[int]
    bonus: int
    deepest: int
    "depth of the draft, which a tree that was shaped on the device does not reach always"


@dataclass(frozen=True)
class Verdict:
    """On the device: path_K holds the accepted scored positions and tokens_K their tokens, both padded beyond `count`;
    `last` is the deepest accepted scored position (0: the pending token), `bonus` the next token.

    All but `last` are views of `packed`, which is what the host is told.
    """

    packed: Tensor
    count: Tensor
    bonus: Tensor
    path_K: Tensor
    tokens_K: Tensor
    last: Tensor

    @classmethod
    def of(cls, packed: Tensor, last: Tensor) -> Verdict:
        """`packed` holds count, bonus, the draft's depth, path_K and tokens_K."""
        longest = (packed.shape[0] - 3) // 2
        return cls(packed, packed[0], packed[1], packed[3 : 3 + longest], packed[3 + longest :], last)

    def host(self) -> Accepted:
        """THE device-to-host copy of a round."""
        count, bonus, deepest, *rest = self.packed.tolist()
        return Accepted(rest[:count], rest[len(rest) // 2 :][:count], bonus, deepest)


@dataclass(frozen=True)
class Typical:
    """Medusa's typical acceptance: accept x where p(x) > min(epsilon, delta * exp(-entropy)). Lossy."""

    epsilon: float = 0.09
    delta: float = 0.3


def verify(
    draft: Draft, logits_MV: Tensor, sampler: Sampler, rule: Typical | None = None, compiled: Compiled = as_it_is
) -> Verdict:
    """Decide a round. `logits_MV` are the target's at the pending token and at every drafted node."""
    if sampler.greedy:
        return verify_greedy(draft, logits_MV, compiled)
    p_MV = sampler.distribution(logits_MV)
    return verify_sampled(draft, p_MV, sampler) if rule is None else verify_typical(draft, p_MV, sampler, rule)


def verify_greedy(draft: Draft, logits_MV: Tensor, compiled: Compiled = as_it_is) -> Verdict:
    shape = draft.shape
    tensors = (draft.tokens_N, logits_MV.argmax(-1), shape.parents_M, shape.depth_M, shape.ancestors_MM)
    return Verdict.of(*compiled(agreed)(*tensors, shape.longest))


def agreed(
    tokens_N: Tensor, best_M: Tensor, parents_M: Tensor, depth_M: Tensor, ancestors_MM: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """A verdict's `packed` and `last` where the target would have said best_M."""
    last = _deepest(depth_M, ancestors_MM, tokens_N == best_M[parents_M[1:]])
    return _down_to(last, _entry(best_M, last), tokens_N, depth_M, ancestors_MM, longest), last


def verify_typical(draft: Draft, p_MV: Tensor, sampler: Sampler, rule: Typical) -> Verdict:
    entropy_M = -(p_MV * p_MV.clamp_min(torch.finfo(p_MV.dtype).tiny).log()).sum(-1)
    threshold_M = (rule.delta * (-entropy_M).exp()).clamp_max(rule.epsilon)
    parents_N = draft.shape.parents_M[1:]
    agrees_N = p_MV[parents_N, draft.tokens_N] > threshold_M[parents_N]
    last = _deepest(draft.shape.depth_M, draft.shape.ancestors_MM, agrees_N)
    return verdict_at(draft, last, sampler.draw(_entry(p_MV, last).view(1, -1))[0])


def verify_sampled(draft: Draft, p_MV: Tensor, sampler: Sampler) -> Verdict:
    """Walk the nodes once, parents before children, keeping the residual of p at the deepest accepted node.

    A child drawn as x is accepted with probability min(1, r(x) / q(x)) where r is the residual so far. On rejection r
    becomes norm(max(r - q, 0)) (point mass: r without x); for draws without replacement q loses x and is renormalised.
    """
    shape, device = draft.shape, p_MV.device
    q_PV = _draft_distributions(draft, p_MV)
    at = torch.zeros((), dtype=torch.long, device=device)
    residual_V = p_MV[0]
    uniform_N = sampler.uniform(len(draft), p_MV)
    for node in range(1, len(draft) + 1):
        token = draft.tokens_N[node - 1]
        mine = shape.parents_M[node] == at
        if q_PV is None:
            accept = mine & (uniform_N[node - 1] < _entry(residual_V, token))
            left_V = residual_V.clone().index_fill_(0, token.view(1), 0.0)
        else:
            assert draft.row_N is not None
            row = draft.row_N[node - 1]
            q_V = _entry(q_PV, row)
            accept = mine & (uniform_N[node - 1] * _entry(q_V, token) < _entry(residual_V, token))
            left_V = (residual_V - q_V).clamp_min(0.0)
            if draft.drawn is Drawn.WITHOUT_REPLACEMENT:
                rest_V = q_V.clone().index_fill_(0, token.view(1), 0.0)
                q_PV = q_PV.index_copy(0, row.view(1), _normalised(rest_V, q_V).view(1, -1))
        rejected_V = torch.where(mine, _normalised(left_V, residual_V), residual_V)
        residual_V = torch.where(accept, p_MV[node], rejected_V)
        at = torch.where(accept, node, at)
    return verdict_at(draft, at, sampler.draw(residual_V.view(1, -1))[0])


def _entry(values: Tensor, at: Tensor) -> Tensor:
    """values[at] for an index () on the device, which plain indexing would first bring to the host."""
    return values.index_select(0, at.view(1))[0]


def _draft_distributions(draft: Draft, p_MV: Tensor) -> Tensor | None:
    """q_PV over the target's vocabulary, or None for point masses."""
    if draft.drawn is Drawn.POINT or len(draft) == 0:
        return None
    assert draft.q_PV is not None, "a random draft must say what it was drawn from"
    q_PV = draft.q_PV.to(p_MV.dtype)
    if draft.vocabulary_V is None:
        return q_PV
    wide_PV = q_PV.new_zeros(q_PV.shape[0], p_MV.shape[1])
    return wide_PV.index_copy_(1, draft.vocabulary_V, q_PV)


def _normalised(weights_V: Tensor, fallback_V: Tensor) -> Tensor:
    """weights / sum; where nothing is left (p equal to q, up to rounding) the fallback, so that nothing becomes NaN."""
    total = weights_V.sum()
    return torch.where(total > 0, weights_V / total.clamp_min(torch.finfo(weights_V.dtype).tiny), fallback_V)


def _deepest(depth_M: Tensor, ancestors_MM: Tensor, agrees_N: Tensor) -> Tensor:
    """The scored position of the deepest node all of whose path agrees."""
    blocked_M = torch.cat((agrees_N.new_zeros(1), ~agrees_N))
    reached_M = ~(ancestors_MM & blocked_M).any(-1)
    return torch.where(reached_M, depth_M, -1).argmax()


def verdict_at(draft: Draft, last: Tensor, bonus: Tensor) -> Verdict:
    """Accept the path down to `last`."""
    shape = draft.shape
    return Verdict.of(_down_to(last, bonus, draft.tokens_N, shape.depth_M, shape.ancestors_MM, shape.longest), last)


def _down_to(
    last: Tensor, bonus: Tensor, tokens_N: Tensor, depth_M: Tensor, ancestors_MM: Tensor, longest: int
) -> Tensor:
    """A verdict's `packed`. Of path_K, entries beyond its depth are 0, the root: padding that is never accepted."""
    depths_K = torch.arange(1, longest + 1, device=last.device)
    on_path_KM = _entry(ancestors_MM, last) & (depth_M == depths_K[:, None])
    path_K = on_path_KM.int().argmax(-1)
    tokens_M = torch.cat((tokens_N.new_zeros(1), tokens_N))
    told = (_entry(depth_M, last), bonus, depth_M.max())
    return torch.cat((torch.stack(told), path_K, tokens_M[path_K]))
