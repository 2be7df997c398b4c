"""The loop that every decoder goes through, the baseline too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from harness.draft import Draft
from harness.method import Method
from harness.sampling import Sampler
from harness.target import Scores, Target
from harness.verify import Typical, Verdict, verify

Phase = Literal["draft", "verify", "accept", "commit", "host"]
"""Where a round's time goes: drafting (and refilling the drafter), scoring, the verdict, moving the accepted path, and
what the device waits for: the verdict's copy and the loop itself."""

Redraw = Callable[[Target, Draft, Verdict], Verdict]
"puts another verdict in the place of the target's own"


@dataclass(frozen=True)
class Limits:
    """When a text ends: after an end-of-sequence token, or at a number of new tokens."""

    max_new_tokens: int
    end_ids: frozenset[int] = frozenset()

    def clip(self, tokens: Sequence[int], already: int) -> list[int]:
        """The part of newly decided tokens that belongs to the text."""
        room = list(tokens[: self.max_new_tokens - already])
        for index, token in enumerate(room):
            if token in self.end_ids:
                return room[: index + 1]
        return room

    def reached(self, new_tokens: Sequence[int]) -> bool:
        return len(new_tokens) >= self.max_new_tokens or (bool(new_tokens) and new_tokens[-1] in self.end_ids)


@dataclass(frozen=True)
class Step:
    """One round, on the host. The first step of a text is the prefill, which drafts nothing and gives one token."""

    drafted: int
    drafted_depth: int
    accepted: int
    "nodes that the verdict accepted, before clipping"
    committed: tuple[int, ...]
    "tokens that entered the text"
    host_syncs: int


class Clock:
    """Somebody who is told when a phase ends; this one does not care."""

    def mark(self, phase: Phase | None) -> None:
        """The phase that ends now, or None where the first round begins."""


@torch.inference_mode()
def decode(
    target: Target,
    method: Method,
    prompt: Sequence[int],
    limits: Limits,
    sampler: Sampler,
    redraw: Redraw | None = None,
    clock: Clock | None = None,
) -> Iterator[Step]:
    """Decode one text, yielding after every round, so that whoever consumes it can hold a stopwatch."""
    clock = clock or Clock()
    prompt_scores = target.prefill(prompt)
    new_tokens = [int(sampler.pick(prompt_scores.logits_MV)[0])]
    tokens = [*prompt, *new_tokens]
    if not limits.reached(new_tokens):
        method.start(tokens, prompt_scores)
    yield Step(0, 0, 0, tuple(new_tokens), host_syncs=1)

    clock.mark(None)
    while not limits.reached(new_tokens):
        target.begin(tokens[-1])
        clock.mark("host")
        draft = method.propose(tokens)
        clock.mark("draft")
        scores = target.score(draft)
        clock.mark("verify")
        verdict = decide(target, draft, scores, sampler, method.rule)
        if redraw is not None:
            verdict = redraw(target, draft, verdict)
        clock.mark("accept")
        target.keep(verdict, draft)
        clock.mark("commit")
        method.observe(draft, scores, verdict)
        clock.mark("draft")
        accepted = verdict.host()
        target.commit(accepted)
        method.settle(draft, accepted)
        committed = limits.clip([*accepted.tokens, accepted.bonus], len(new_tokens))
        new_tokens += committed
        tokens += committed
        clock.mark("host")
        yield Step(len(draft), accepted.deepest, len(accepted.nodes), tuple(committed), 1 + draft.host_syncs)


def decide(target: Target, draft: Draft, scores: Scores, sampler: Sampler, rule: Typical | None) -> Verdict:
    """The verdict on a scored draft, in the target's runtime."""
    drawn = () if draft.q_PV is None or draft.row_N is None else (draft.q_PV, draft.row_N)

    def judge(tokens_N: Tensor, logits_MV: Tensor, *drawn: Tensor) -> Verdict:
        q_PV, row_N = drawn or (None, None)
        told = replace(draft, tokens_N=tokens_N, q_PV=q_PV, row_N=row_N)
        return verify(told, logits_MV, sampler, rule, target.runtime.compiled)

    return target.about(draft.shape, "verify", judge, draft.tokens_N, scores.logits_MV, *drawn)
