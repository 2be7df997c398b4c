"""Attention over the preallocated cache, for transformers' own attention modules and for drafters' layers.

transformers calls `attend_view` through its attention interface: the module projects and rotates, the view decides
where keys and values are kept and who sees whom. Masks are always explicit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.cache import KVCache

INTERFACE = "harness"
"the name under which transformers knows `attend_view`"


class View(Protocol):
    """What one forward may see, and where it keeps its keys and values."""

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...

    def mask(self, layer: int, groups: int) -> Tensor | None:
        """(groups * M, S), or (B, 1, groups * M, S), or None where every query sees every key.

        Boolean, true where a query may look; or a number to add to each score.
        """

    def causal(self, layer: int) -> bool:
        """True where the mask is the plain lower triangle of a square, which kernels know by themselves."""


@dataclass
class CacheView:
    """A forward of M tokens into slots start .. start + M of a cache.

    block_MA says which of the A = (start - length) + M newest slots each query sees; the committed prefix is visible to
    all. None means causal. `windows` gives the sliding window of the layers that have one, `positions_M` the queries'.
    """

    cache: KVCache | None
    start: int
    positions_M: Tensor
    block_MA: Tensor | None = None
    windows: dict[int, int] | None = None

    def __post_init__(self) -> None:
        self._masks: dict[tuple[int | None, int], Tensor | None] = {}
        self._stop = self.start + self.positions_M.shape[-1]

    def causal(self, layer: int) -> bool:
        return self.start == 0 and self.block_MA is None and self._window(layer) is None

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.cache is not None
        return self.cache.write(layer, self.start, keys, values)

    def mask(self, layer: int, groups: int) -> Tensor | None:
        window = self._window(layer)
        key = (window, groups)
        if key not in self._masks:
            visible_MS = self._visible(window)
            self._masks[key] = None if visible_MS is None else visible_MS.repeat(groups, 1)
        return self._masks[key]

    def _window(self, layer: int) -> int | None:
        """The layer's sliding window, or None while everything still fits into it."""
        window = (self.windows or {}).get(layer)
        return None if window is None or window >= self._stop else window

    def _visible(self, window: int | None) -> Tensor | None:
        size, stop, device = self.positions_M.shape[-1], self._stop, self.positions_M.device
        if self.block_MA is not None:
            visible_MS = F.pad(self.block_MA, (stop - self.block_MA.shape[1], 0), value=True)
        elif size == 1:
            visible_MS = None
        else:
            visible_MS = torch.ones(size, stop, dtype=torch.bool, device=device).tril(self.start)
        if window is None:
            return visible_MS
        # Slot i of the prefix holds position i; the scratch slots of this forward hold its own positions.
        key_S = torch.cat((torch.arange(self.start, device=device), self.positions_M))
        near_MS = self.positions_M[:, None] - key_S < window
        return near_MS if visible_MS is None else visible_MS & near_MS


class Slots(NamedTuple):
    """One layer's view at fixed addresses, as tensors: a compiled layer takes nothing else."""

    both: Tensor
    slots_M: Tensor
    bias_QS: Tensor

    def causal(self, layer: int) -> bool:
        return False

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.both[0].index_copy_(2, self.slots_M, keys), self.both[1].index_copy_(2, self.slots_M, values)

    def store_both(self, both_2BHMd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in one operation."""
        stored = self.both.index_copy_(3, self.slots_M, both_2BHMd)
        return stored[0], stored[1]

    def mask(self, layer: int, groups: int) -> Tensor:
        return self.bias_QS


class FixedView:
    """A short forward over a cache with fixed addresses, `at` slots beyond its length; what is masked is the same.

    Every key of the cache's span is read and the mask, added to the scores, hides the rest, so nothing here depends on
    a length that the host knows.
    """

    def __init__(
        self,
        cache: KVCache,
        at: int,
        positions_M: Tensor,
        block_MA: Tensor | None = None,
        windows: dict[int, int] | None = None,
    ) -> None:
        self.cache, self.at, self.positions_M, self.block_MA = cache, at, positions_M, block_MA
        self.windows = windows or {}
        self.slots_M = cache.positions(at, positions_M.shape[-1])
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def causal(self, layer: int) -> bool:
        return False

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.slots(layer, 1).store(layer, keys, values)

    def slots(self, layer: int, groups: int) -> Slots:
        """What one layer needs of this view, as tensors."""
        return Slots(self.cache.both[layer][..., : self.cache.span, :], self.slots_M, self.mask(layer, groups))

    def mask(self, layer: int, groups: int) -> Tensor:
        """(groups * M, span), to be added to the scores, in the cache's dtype."""
        window = self.windows.get(layer)
        key = (None if window is None or window >= self.cache.span else window, groups)
        if key not in self._masks:
            tensors = (self.cache.here, self.slots_M, self.positions_M, self.block_MA)
            sizes = (self.cache.span, self.at, *key)
            self._masks[key] = self.cache.compiled(bias)(*tensors, *sizes, self.cache.dtype)
        return self._masks[key]


def bias(
    here: int | Tensor,
    slots_M: Tensor,
    positions_M: Tensor,
    block_MA: Tensor | None,
    span: int,
    at: int,
    window: int | None,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """(groups * M, span): 0 where a query of a FixedView may look and -inf elsewhere."""
    key_S = torch.arange(span, device=positions_M.device)
    offset_S = key_S - here
    if block_MA is None:
        hidden_MS = key_S > slots_M[:, None]
    else:
        newest = block_MA.shape[1]
        inside_MS = block_MA[:, offset_S.clamp(0, newest - 1)]
        hidden_MS = (offset_S >= 0) & ~(inside_MS & (offset_S < newest))
    if window is not None:
        # Slot i of the prefix holds position i; the scratch slots of this forward hold its own positions.
        own_S = (offset_S - at).clamp(0, positions_M.shape[-1] - 1)
        position_S = torch.where(offset_S >= at, positions_M[own_S], key_S)
        hidden_MS = hidden_MS | (positions_M[:, None] - position_S >= window)
    bias_MS = torch.zeros(hidden_MS.shape, dtype=dtype, device=hidden_MS.device)
    return bias_MS.masked_fill(hidden_MS, float("-inf")).repeat(groups, 1)


def view_of(
    cache: KVCache,
    at: int,
    positions_M: Tensor,
    block_MA: Tensor | None = None,
    windows: dict[int, int] | None = None,
) -> CacheView | FixedView:
    """The view of a forward of M tokens into the slots from `at` beyond the cache's length on."""
    if cache.fixed and at + positions_M.shape[-1] <= cache.scratch:
        return FixedView(cache, at, positions_M, block_MA, windows)
    return CacheView(cache, cache.length + at, positions_M, block_MA, windows)


@dataclass
class ContextView:
    """Training: queries that see a fixed context per layer and one another, without writing anywhere.

    context holds the keys and values of positions 0 .. T-1 per layer, (B, H, T, d); mask_B1QS covers T + Q keys, the
    queries' own at positions_BQ last. `windows` gives the sliding window of the layers that have one.
    """

    context: KVCache | FreshView
    mask_B1QS: Tensor
    positions_BQ: Tensor
    windows: dict[int, int] | None = None

    def causal(self, layer: int) -> bool:
        return False

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return (
            torch.cat((self.context.keys[layer], keys), dim=2),
            torch.cat((self.context.values[layer], values), dim=2),
        )

    def mask(self, layer: int, groups: int) -> Tensor:
        mask_B1QS, window = self.mask_B1QS, (self.windows or {}).get(layer)
        if window is not None:
            context = mask_B1QS.shape[-1] - self.positions_BQ.shape[-1]
            prefix_T = torch.arange(context, device=mask_B1QS.device).expand(mask_B1QS.shape[0], -1)
            key_BS = torch.cat((prefix_T, self.positions_BQ), dim=-1)
            near_BQS = self.positions_BQ[:, :, None] - key_BS[:, None] < window
            mask_B1QS = mask_B1QS & near_BQS[:, None]
        return mask_B1QS if groups == 1 else mask_B1QS.repeat(1, 1, groups, 1)


@dataclass
class FreshView(CacheView):
    """A whole text at once, its keys and values kept aside instead of in a cache, so that gradients flow through.

    Made with `cache=None`; afterwards the view itself serves as a ContextView's context.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer], self.values[layer] = keys, values
        return keys, values


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None,
    causal: bool = False,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Grouped-query attention, (B, H * G, M, d) in and out, with keys and values of H heads.

    The G queries that share a head are folded into the query axis instead of repeating the keys, so grouped queries
    survive a mask. `mask` covers the folded axis, (.., G * M, S): boolean, or added to the scores of a short forward
    (one batch), for which the fused kernels are too little parallel; `causal` stands for a square lower triangle.
    """
    batch, heads, size, width = query.shape
    groups = heads // keys.shape[1]
    if causal and softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=groups > 1)
    folded = query.reshape(batch, keys.shape[1], groups * size, width)
    if softcap is None and mask is not None and mask.is_floating_point():
        turned = keys[0].transpose(-1, -2)
        # Compiled, the sum is part of the softmax's kernel, where baddbmm would copy the mask first; but float16 has no
        # room for scores that are not scaled yet.
        if torch.compiler.is_compiling() and query.dtype != torch.float16:
            scores = torch.bmm(folded[0], turned) * scale + mask
        else:
            scores = torch.baddbmm(mask[None], folded[0], turned, alpha=scale)
        out = torch.bmm(torch.softmax(scores, dim=-1), values[0])
    elif softcap is None:
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = softcap * torch.tanh(folded @ keys.transpose(-1, -2) * scale / softcap)
        if mask is not None:
            scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
        out = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values
    return out.reshape(batch, heads, size, width)


def attend_view(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    view: View,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: rotated queries and keys in, (B, M, heads, d) out."""
    # Slots are one layer's already; that they do not ask which makes compiled code the same for all layers.
    layer: int = 0 if isinstance(view, Slots) else module.layer_idx  # type: ignore[assignment]
    keys, values = view.store(layer, key, value)
    causal = softcap is None and view.causal(layer)
    mask = None if causal else view.mask(layer, query.shape[1] // keys.shape[1])
    mask = None if mask is None else mask.to(query.device)
    out = attend(query, keys, values, mask=mask, causal=causal, scale=scaling, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


def rotary(positions_M: Tensor, frequencies_d: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021), (M, d) each, in the half-split layout."""
    angles = positions_M[..., None] * frequencies_d
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache
def frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """(width,), in float32, the two halves alike: what `rotary` takes."""
    half = base ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    return torch.cat((half, half))
