"""Where a trial's peak memory went. Values only.

On an accelerator everything is measured by itself: what tensors of weights, drafter and cache take, what was allocated
once they were loaded, what captured graphs took, and the peak. Activations and workspace are what the peak was above
the loaded state; what the loaded state holds beyond the tensors that were counted is `unattributed`, and small. Slack
is what the allocator reserved and nobody asked for: blocks that were free at the peak, and what blocks are larger than
the tensors in them (up to 1 MiB each, so several per cent of a small model). On a CPU only the resident set is known:
what the program took before anything was loaded, and the rest, in which loading, activations and workspace cannot be
told apart.
"""

from __future__ import annotations

import msgspec

from harness.results import Memory

ADDS_UP = 0.02
"share of the peak that may be unattributed"


class Attribution(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by what holds them."""

    parts: dict[str, int]
    "by name, in the order to show them"
    peak_bytes: int
    "the allocator's peak, or on a CPU the largest resident set"
    unattributed_bytes: int
    "of the peak, what is in no part; negative where parts were counted that were not there at the peak"

    @property
    def adds_up(self) -> bool:
        return abs(self.unattributed_bytes) <= ADDS_UP * self.peak_bytes

    @property
    def inflated(self) -> bool:
        """Whether the peak holds what is not this cell's, as far as what was counted tells."""
        return self.unattributed_bytes > 0 and not self.adds_up


def attribute(memory: Memory) -> Attribution | None:
    """None where a part or the peak is not known."""
    if memory.weights_bytes is None:
        return None
    held = {
        "weights": memory.weights_bytes,
        "drafter": memory.drafter_bytes or 0,
        "KV cache": memory.cache_bytes or 0,
    }
    if memory.peak_allocated_bytes is not None:
        return _of_allocator(memory, held, memory.peak_allocated_bytes)
    return _of_process(memory, held)


def _of_allocator(memory: Memory, held: dict[str, int], peak: int) -> Attribution | None:
    if memory.load_bytes is None:
        return None
    graphs = memory.graphs_bytes or 0
    rounding = memory.rounding_bytes or 0
    parts = held | {"graphs": graphs, "activations, workspace": peak - memory.load_bytes - graphs}
    unattributed = peak - sum(parts.values()) - rounding
    if memory.peak_reserved_bytes is not None:
        parts["slack"] = memory.peak_reserved_bytes - peak + rounding
    return Attribution(parts=parts, peak_bytes=peak, unattributed_bytes=unattributed)


def _of_process(memory: Memory, held: dict[str, int]) -> Attribution | None:
    if memory.peak_rss_bytes is None or memory.program_bytes is None:
        return None
    parts = held | {"program": memory.program_bytes}
    rest = memory.peak_rss_bytes - sum(parts.values())
    parts["loading, activations, workspace"] = max(rest, 0)
    return Attribution(parts=parts, peak_bytes=memory.peak_rss_bytes, unattributed_bytes=min(rest, 0))
