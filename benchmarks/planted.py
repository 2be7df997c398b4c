"""A decoder with a planted slow-down: prompt lookup that burns a share of every round's time before the next.

Found by its entry point, which `write_entry_point` puts where PYTHONPATH can see it, as a stranger's would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated

import msgspec

from harness.draft import Draft
from harness.sampling import Sampler
from harness.target import Target
from harness.verify import Accepted
from methods.prompt_lookup import PromptLookup, PromptLookupOptions


class BurningOptions(PromptLookupOptions, frozen=True, kw_only=True):
    share: Annotated[float, msgspec.Meta(ge=0)] = 0.05
    "of a round's time that is burnt after it"


class Burning(PromptLookup):
    name = "burning"
    summary = "prompt lookup that wastes time on purpose"
    Options = BurningOptions

    @classmethod
    def load(cls, target: Target, options: PromptLookupOptions, drafter: Path | None, sampler: Sampler) -> Burning:
        return cls(target, options)

    def propose(self, tokens: Sequence[int]) -> Draft:
        self.began = perf_counter()
        return super().propose(tokens)

    def settle(self, draft: Draft, accepted: Accepted) -> None:
        assert isinstance(self.options, BurningOptions)
        until = perf_counter() + self.options.share * (perf_counter() - self.began)
        while perf_counter() < until:
            pass


def write_entry_point(directory: Path) -> Path:
    """The package metadata that makes `burning` a method; the directory, for PYTHONPATH."""
    info = directory / "planted_decoders-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-decoders\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[harness.methods]\nburning = benchmarks.planted:Burning\n")
    return directory
