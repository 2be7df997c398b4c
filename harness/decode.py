"""The loop that every decoder goes through, the baseline too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from harness.draft import Draft
from harness.method import Method
from harness.sampling import Sampler
from harness.target import Target
from harness.verify import Verdict, verify

Redraw = Callable[[Draft, Verdict], Verdict]
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


@torch.inference_mode()
def decode(
    target: Target,
    method: Method,
    prompt: Sequence[int],
    limits: Limits,
    sampler: Sampler,
    redraw: Redraw | None = None,
) -> Iterator[Step]:
    """Decode one text, yielding after every round, so that whoever consumes it can hold a stopwatch."""
    prompt_scores = target.prefill(prompt)
    new_tokens = [int(sampler.pick(prompt_scores.logits_MV)[0])]
    tokens = [*prompt, *new_tokens]
    if not limits.reached(new_tokens):
        method.start(tokens, prompt_scores)
    yield Step(0, 0, 0, tuple(new_tokens), host_syncs=1)

    while not limits.reached(new_tokens):
        draft = method.propose(tokens)
        scores = target.score(tokens[-1], draft)
        verdict = verify(draft, scores.logits_MV, sampler, method.rule)
        if redraw is not None:
            verdict = redraw(draft, verdict)
        target.keep(verdict, draft)
        nodes, accepted, bonus = verdict.host()
        committed = limits.clip([*accepted, bonus], len(new_tokens))
        new_tokens += committed
        tokens += committed
        if not limits.reached(new_tokens):
            method.observe(draft, scores, verdict)
        yield Step(len(draft), draft.shape.longest, len(nodes), tuple(committed), 1 + draft.host_syncs)
