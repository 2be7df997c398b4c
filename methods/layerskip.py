"""Self-speculation by skipping layers (Draft & Verify: Zhang et al. 2023, arXiv 2309.08168): the target without some of
its attention and MLP sublayers drafts token by token over the verified cache, and stops when it is no longer sure.

The threshold of the adaptive stop follows the paper's section 3.3: an average of the acceptance rate is steered towards
a goal. No training and no memory; which sublayers to skip is found by search (`tune`), or by single-layer ablation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from harness.draft import Draft, Drawn, chain
from harness.method import Method, Options, Positive
from harness.sampling import Sampler
from harness.target import Scores, Target
from harness.trunk import Layers
from harness.verify import Accepted


class LayerSkipOptions(Options, frozen=True, kw_only=True):
    skip: tuple[int, ...] | None = None
    "layers skipped whole; default: a quarter, every second layer of the middle"
    skip_attention: tuple[int, ...] = ()
    "layers whose attention is skipped"
    skip_mlp: tuple[int, ...] = ()
    "layers whose MLP is skipped"
    gamma: Positive = 8
    "tokens drafted at most"
    threshold: float | None = None
    "draft on while the draft's top probability is at least this; default: adaptive, from 0.8"
    goal: float = 0.9
    "acceptance rate that the adaptive threshold aims at"


# Least harmful first when each layer of SmolLM2-135M-Instruct is left out alone; others start from their middle.
ABLATED = {30: (25, 12, 3, 7, 6, 10, 5)}


class LayerSkip(Method):
    name = "layerskip"
    summary = "the target without some sublayers drafts until it is unsure"
    source = "Zhang et al. 2023, arXiv 2309.08168"
    Options = LayerSkipOptions

    def __init__(self, target: Target, layers: Layers, options: LayerSkipOptions, sampler: Sampler) -> None:
        self.target, self.layers, self.options, self.sampler = target, layers, options, sampler
        self.adaptive = options.threshold is None
        self.threshold = 0.8 if options.threshold is None else options.threshold
        self.rate = options.goal

    @classmethod
    def load(cls, target: Target, options: LayerSkipOptions, drafter: Path | None, sampler: Sampler) -> LayerSkip:
        skip = default_skip(target.depth) if options.skip is None else options.skip
        named = {*skip, *options.skip_attention, *options.skip_mlp}
        if any(not 0 <= layer < target.depth for layer in named):
            raise ValueError(f"layers to skip must be 0 to {target.depth - 1} for this model, not {sorted(named)}")
        layers = Layers.of(range(target.depth)).without((*skip, *options.skip_attention), (*skip, *options.skip_mlp))
        return cls(target, layers, options, sampler)

    @classmethod
    def for_random_weights(cls, options: LayerSkipOptions) -> LayerSkipOptions:
        return msgspec.structs.replace(options, threshold=0.0) if options.threshold is None else options

    @property
    def reach(self) -> int:
        return 2 + self.options.gamma

    def start(self, tokens: Sequence[int], scores: Scores) -> None:
        if self.adaptive:
            self.threshold, self.rate = 0.8, self.options.goal

    def propose(self, tokens: Sequence[int]) -> Draft:
        ids, qs = [self.target.pending_1], []
        for step in range(self.options.gamma):
            drafted_1, sure_1, q_1V = self.target.call(("step", step), partial(self._step, step), ids[-1])
            ids.append(drafted_1)
            qs.append(q_1V)
            if float(sure_1) < self.threshold:
                break
        drafted_N = torch.cat(ids[1:])
        size = drafted_N.shape[0]
        shape = chain(size, self.target.device)
        if self.sampler.greedy:
            return Draft(drafted_N, shape, host_syncs=size)
        rows = torch.arange(size, device=self.target.device)
        return Draft(drafted_N, shape, Drawn.IID, torch.cat(qs), rows, host_syncs=size)

    def _step(self, at: int, ids_1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next token, how sure the draft is of its best, and its distribution."""
        logits_1V = self.target.trunk.head(self.target.peek(ids_1, at=at, layers=self.layers))
        if self.sampler.greedy:
            q_1V = torch.softmax(logits_1V.float(), dim=-1)
            sure_1, drafted_1 = q_1V.max(-1)
            return drafted_1, sure_1, q_1V
        q_1V = self.sampler.distribution(logits_1V)
        return self.sampler.draw(q_1V), q_1V.max(-1).values, q_1V

    def settle(self, draft: Draft, accepted: Accepted) -> None:
        if not self.adaptive:
            return
        matched = len(accepted.nodes) / len(draft)
        self.rate = 0.5 * self.rate + 0.5 * matched
        step = 0.01 if self.rate < self.options.goal else -0.01
        self.threshold = min(0.99, max(0.0, 0.9 * self.threshold + 0.1 * (self.threshold + step)))


def default_skip(depth: int) -> tuple[int, ...]:
    """A quarter of the layers: known to be the least harmful, or else every second one of the middle."""
    return ABLATED.get(depth, tuple(range(depth // 4, depth - depth // 4, 2)))
