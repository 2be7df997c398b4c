"""Prompt lookup decoding (Saxena 2023): draft what followed the last few tokens when they last occurred in the text.

No model, no memory: the method that tells how much of a speed-up is mere repetition.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.draft import Draft, nothing, point_chain
from harness.method import Method, Options, Positive
from harness.sampling import Sampler
from harness.target import Target


class PromptLookupOptions(Options, frozen=True, kw_only=True):
    gamma: Positive = 8
    "tokens copied at most"
    ngram: Positive = 3
    "longest suffix looked up; shorter ones are tried after it"


class PromptLookup(Method):
    name = "prompt-lookup"
    summary = "copies what followed the last tokens before; needs no training"
    source = "Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding"
    Options = PromptLookupOptions

    def __init__(self, target: Target, options: PromptLookupOptions) -> None:
        self.target, self.options = target, options

    @classmethod
    def load(cls, target: Target, options: PromptLookupOptions, drafter: Path | None, sampler: Sampler) -> PromptLookup:
        return cls(target, options)

    @property
    def reach(self) -> int:
        return 1 + self.options.gamma

    def propose(self, tokens: Sequence[int]) -> Draft:
        for size in range(self.options.ngram, 0, -1):
            follower = _follower(tokens, size)
            if follower is not None:
                copied = tokens[follower : follower + self.options.gamma]
                return point_chain(copied, self.target.device)
        return nothing(self.target.device)


def _follower(tokens: Sequence[int], size: int) -> int | None:
    """Where the text goes on after the latest earlier occurrence of its last `size` tokens."""
    suffix = tokens[-size:]
    for start in range(len(tokens) - size - 1, -1, -1):
        if tokens[start : start + size] == suffix:
            return start + size
    return None
