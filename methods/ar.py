"""Autoregressive decoding: the method that proposes nothing, and so pays for the same loop as all others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.draft import Draft, nothing
from harness.method import Method, Options
from harness.sampling import Sampler
from harness.target import Target


class AutoregressiveOptions(Options, frozen=True, kw_only=True):
    weights: str = "base"
    "`base`, or the name of a method whose fine-tuned weights are the target (set by the plan)"


class Autoregressive(Method):
    name = "ar"
    summary = "one token a pass; the baseline"
    Options = AutoregressiveOptions

    def __init__(self, target: Target) -> None:
        self.target = target

    @classmethod
    def target_weights(cls, options: AutoregressiveOptions) -> str:
        return options.weights

    @classmethod
    def load(
        cls, target: Target, options: AutoregressiveOptions, drafter: Path | None, sampler: Sampler
    ) -> Autoregressive:
        return cls(target)

    def propose(self, tokens: Sequence[int]) -> Draft:
        return nothing(self.target.device)
