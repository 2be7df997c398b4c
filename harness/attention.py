"""Attention over the preallocated cache, for transformers' own attention modules and for drafters' layers.

transformers calls `attend_view` through its attention interface: the module projects and rotates, the view decides
where keys and values are kept and who sees whom. Masks are boolean, true where a query may look, and always explicit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

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
        """(groups * M, S), or (B, 1, groups * M, S), or None where every query sees every key."""

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
    survive a mask. `mask` covers the folded axis, (.., G * M, S); `causal` stands for a square lower triangle.
    """
    batch, heads, size, width = query.shape
    groups = heads // keys.shape[1]
    if causal and softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=groups > 1)
    folded = query.reshape(batch, keys.shape[1], groups * size, width)
    if softcap is None:
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = softcap * torch.tanh(folded @ keys.transpose(-1, -2) * scale / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
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
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = view.store(layer, key, value)
    causal = softcap is None and view.causal(layer)
    mask = None if causal else view.mask(layer, query.shape[1] // keys.shape[1])
    mask = None if mask is None else mask.to(query.device)
    out = attend(query, keys, values, mask=mask, causal=causal, scale=scaling, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


def rotary(positions_M: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021), (M, width) each, in the half-split layout."""
    angles = positions_M[..., None] * _frequencies(width, base, positions_M.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache
def _frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """(width,), in float32, the two halves alike."""
    half = base ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    return torch.cat((half, half))


def rotate(x_BHMd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply `rotary` to queries or keys."""
    first, second = x_BHMd.chunk(2, dim=-1)
    return x_BHMd * cos + torch.cat((-second, first), dim=-1) * sin
