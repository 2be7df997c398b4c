"""Drafts: token trees that a method proposes and the target scores in one pass.

Shape letters, here and everywhere: N drafted nodes, M = N + 1 scored positions (the pending token first),
V vocabulary, D hidden width, T committed tokens, K longest path, L layers, P parents that drew children.
Scored position 0 is the pending token; drafted node j (1-based) is scored position j. Parents come before children.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache

import torch
from torch import Tensor

from harness.cache import Compiled, as_it_is

Tokens = Callable[[Tensor], Tensor]
"target ids of a head's rows"


class Drawn(Enum):
    """How the siblings under one parent were drawn: it decides the rule that keeps sampling lossless."""

    POINT = "point mass"
    "deterministic: top-k, lookup; q is one at the drafted token"
    IID = "iid"
    "each from q, independently"
    WITHOUT_REPLACEMENT = "without replacement"
    "in this order, each from q renormalised without its elder siblings"


@dataclass(frozen=True)
class Shape:
    """A tree's shape on one device.

    parents_M[j] is the scored position of j's parent (0 for the root itself); depth_M counts edges from the root;
    ancestors_MM[j, i] is true where i is j or an ancestor of j. `longest` bounds the depth and is known on the host.
    """

    parents_M: Tensor
    depth_M: Tensor
    ancestors_MM: Tensor
    longest: int
    chain: bool = False
    fixed: bool = False
    "whether this very object comes again: a static tree's shape"


@cache
def tree(parents: tuple[int, ...], device: torch.device) -> Shape:
    """The static tree whose node j = 1..N hangs under scored position `parents[j - 1]`. Cached.

    Raises ValueError where a parent does not come before its child.
    """
    depth = [0]
    rows = [{0}]
    for node, parent in enumerate(parents, start=1):
        if not 0 <= parent < node:
            raise ValueError(f"node {node} has parent {parent}: parents must come before their children")
        depth.append(depth[parent] + 1)
        rows.append(rows[parent] | {node})
    size = len(rows)
    ancestors = torch.zeros(size, size, dtype=torch.bool)
    for node, row in enumerate(rows):
        ancestors[node, list(row)] = True
    return Shape(
        parents_M=torch.tensor((0, *parents), device=device),
        depth_M=torch.tensor(depth, device=device),
        ancestors_MM=ancestors.to(device),
        longest=max(depth),
        chain=all(parent == node for node, parent in enumerate(parents)),
        fixed=True,
    )


def chain(length: int, device: torch.device) -> Shape:
    """A path of `length` nodes; no mask is needed to score it."""
    return tree(tuple(range(length)), device)


@dataclass(frozen=True)
class RankedTree:
    """A static tree of guesses made at once: node j is guess rank_N[j] (0: the best) for depth depth_N[j] (from 0)."""

    shape: Shape
    depth_N: Tensor
    rank_N: Tensor
    ranks: int

    @classmethod
    def of(cls, paths: Sequence[tuple[int, ...]], device: torch.device) -> RankedTree:
        """From paths named by the rank taken at each depth: (0,), (1,), (0, 0), ..."""
        order = sorted(paths, key=lambda path: (len(path), path))
        index = {(): 0} | {path: node for node, path in enumerate(order, start=1)}
        return cls(
            tree(tuple(index[path[:-1]] for path in order), device),
            torch.tensor([len(path) - 1 for path in order], device=device),
            torch.tensor([path[-1] for path in order], device=device),
            1 + max(path[-1] for path in order),
        )

    def __len__(self) -> int:
        return self.rank_N.shape[0]

    def draft(self, logits_KV: Tensor, tokens: Tokens, compiled: Compiled = as_it_is) -> Draft:
        """logits_KV[i] guess the token at depth i; `tokens` are the target's ids of their columns."""
        guesses_KR = tokens(best_of(logits_KV, self.ranks)[1])
        return Draft(guesses_KR[self.depth_N, self.rank_N], self.shape)


@dataclass(frozen=True)
class LikeliestTree:
    """The `nodes` likeliest of a tree of candidates, chosen anew every round (EAGLE-2, arXiv 2406.16858, section 4.2).

    A path's chance is the product of its guesses'.
    """

    candidates: RankedTree
    nodes: int

    def __len__(self) -> int:
        return self.nodes

    def draft(self, logits_KV: Tensor, tokens: Tokens, compiled: Compiled = as_it_is) -> Draft:
        """As RankedTree's."""
        rows_KR, log_q_KR = compiled(likeliest_columns)(logits_KV, self.candidates.ranks)
        whole, guesses = self.candidates.shape, (self.candidates.depth_N, self.candidates.rank_N)
        parts = (log_q_KR[guesses], whole.parents_M, whole.depth_M, whole.ancestors_MM)
        keep_N, parents_M, depth_M, ancestors_MM = compiled(likeliest_subtree)(*parts, self.nodes)
        shape = Shape(parents_M, depth_M, ancestors_MM, min(whole.longest, self.nodes))
        return Draft(tokens(rows_KR)[guesses][keep_N], shape)


def likeliest_subtree(
    log_q_C: Tensor, parents_M: Tensor, depth_M: Tensor, ancestors_MM: Tensor, nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which `nodes` of C candidates in a tree make the likeliest paths, and these nodes' parents, depths and ancestors.

    log_q_C are the logarithms of each one's chance after its parent.
    """
    own_CC = ancestors_MM[1:, 1:]
    chance_C = torch.where(own_CC, log_q_C, 0.0).sum(-1)
    # Rounded too, a child is never likelier than its parent: rows of one length are summed in one order.
    keep_N = likeliest_nodes(chance_C, nodes)
    keep_M = torch.cat((keep_N.new_zeros(1), keep_N + 1))
    kept_parents_M = torch.searchsorted(keep_M, parents_M[keep_M])
    return keep_N, kept_parents_M, depth_M[keep_M], ancestors_MM[keep_M[:, None], keep_M]


def likeliest_nodes(chance_C: Tensor, nodes: int) -> Tensor:
    """The `nodes` likeliest of a tree where children come after their parents and are never likelier: all connected."""
    return chance_C.sort(descending=True, stable=True).indices[:nodes].sort().values


BLOCKS = (1024, 512, 256, 128)
SORTED_AT_ONCE = 128
"values of a row that torch sorts by one kernel in less time than its `topk` takes"


def best_of(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best `count` of each row and where they are, (R, count), best first.

    In two steps: of blocks and then of their best, for torch's `topk` has a wide row read by one block of threads.
    """
    rows, width = scores_RV.shape
    block = next((block for block in BLOCKS if width % block == 0 and width > block >= count), None)
    if block is None:
        best_RC, place_RC = scores_RV.topk(count, dim=-1)
        return best_RC, place_RC
    some_RBC, inside_RBC = scores_RV.view(rows, -1, block).topk(count, dim=-1, sorted=False)
    places_RS = (inside_RBC + torch.arange(0, width, block, device=scores_RV.device)[:, None]).flatten(1)
    best_RC, which_RC = best_of_few(some_RBC.flatten(1), count)
    return best_RC, places_RS.gather(1, which_RC)


def likeliest_columns(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest of each row, likeliest first, and the logarithms of their chances, (R, count) each."""
    log_q_RV = torch.log_softmax(logits_RV, dim=-1, dtype=torch.float32)
    rows_RC = best_of(logits_RV, count)[1]
    return rows_RC, log_q_RV.gather(1, rows_RC)


def best_of_few(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best `count` of each row, (.., count), best first, and where they are."""
    if scores.shape[-1] > SORTED_AT_ONCE:
        values, places = scores.topk(count, dim=-1)
    else:
        values, places = scores.sort(dim=-1, descending=True)
    return values[..., :count], places[..., :count]


def best_paths(accuracy: Sequence[Sequence[float]], nodes: int) -> list[tuple[int, ...]]:
    """The `nodes` paths most likely to be right, where accuracy[i][r] is how often the r-th guess for depth i is.

    A path's chance is taken as the product of its guesses' (Medusa, arXiv 2401.10774, section 3.3.3); parents always
    come before their children.
    """
    queue: list[tuple[float, tuple[int, ...]]] = [(-share, (rank,)) for rank, share in enumerate(accuracy[0])]
    heapq.heapify(queue)
    chosen: list[tuple[int, ...]] = []
    while queue and len(chosen) < nodes:
        chance, path = heapq.heappop(queue)
        chosen.append(path)
        if len(path) < len(accuracy):
            for rank, share in enumerate(accuracy[len(path)]):
                heapq.heappush(queue, (chance * share, (*path, rank)))
    return chosen


def dynamic_tree(parents_N: Tensor, longest: int, compiled: Compiled = as_it_is) -> Shape:
    """A tree whose shape was decided on the device (EAGLE-2), no deeper than `longest`."""
    parents_M, depth_M, ancestors_MM = compiled(ancestry)(parents_N, longest)
    return Shape(parents_M, depth_M, ancestors_MM, longest)


def ancestry(parents_N: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """parents_M, depth_M and ancestors_MM of such a tree, in `longest` gathers."""
    size = parents_N.shape[0] + 1
    parents_M = torch.cat((parents_N.new_zeros(1), parents_N))
    above = [torch.arange(size, device=parents_N.device)]
    for _ in range(longest):
        above.append(parents_M[above[-1]])
    ancestors_MM = torch.zeros(size, size, dtype=torch.bool, device=parents_N.device)
    ancestors_MM.scatter_(1, torch.stack(above, dim=1), True)
    return parents_M, ancestors_MM.sum(1) - 1, ancestors_MM


@dataclass(frozen=True)
class Draft:
    """Proposed tokens and how they came to be.

    tokens_N are target ids. For sampling, q_PV holds one distribution per parent that drew children (already at the
    run's temperature, over the target's vocabulary or over `vocabulary_V`, the ids of a smaller draft vocabulary), and
    row_N the row of q_PV that each node was drawn from. Siblings are distinct unless drawn iid.
    """

    tokens_N: Tensor
    shape: Shape
    drawn: Drawn = Drawn.POINT
    q_PV: Tensor | None = None
    row_N: Tensor | None = None
    vocabulary_V: Tensor | None = None
    host_syncs: int = field(default=0)
    "copies to the host that the method needed to decide this draft (an adaptive stop)"

    def __len__(self) -> int:
        return self.tokens_N.shape[0]


def nothing(device: torch.device) -> Draft:
    """The draft of a round without drafting."""
    return Draft(torch.empty(0, dtype=torch.long, device=device), chain(0, device))


def point_chain(tokens: Sequence[int] | Tensor, device: torch.device) -> Draft:
    """A chain of tokens chosen without randomness."""
    tokens_N = torch.as_tensor(tokens, dtype=torch.long, device=device)
    return Draft(tokens_N, chain(tokens_N.shape[0], device))
