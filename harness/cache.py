"""A preallocated key-value cache: committed slots, then scratch slots that nobody has to clean up.

Shapes: B batch, H key-value heads, S slots, d head width. Slot i < length holds position i. A forward writes its keys
and values from slot `length` (or beyond) on; only `commit` moves `length`, so what was not committed was never there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class KVCache:
    """Keys and values of some layers. `layers` maps a layer's index to (key-value heads, head width)."""

    def __init__(
        self,
        layers: Mapping[int, tuple[int, int]],
        capacity: int,
        *,
        device: torch.device | Mapping[int, torch.device],
        dtype: torch.dtype,
        batch: int = 1,
    ) -> None:
        def empty(layer: int, heads: int, width: int) -> Tensor:
            where = device[layer] if isinstance(device, Mapping) else device
            return torch.zeros(batch, heads, capacity, width, device=where, dtype=dtype)

        self.capacity = capacity
        self.length = 0
        self.keys = {layer: empty(layer, *size) for layer, size in layers.items()}
        self.values = {layer: empty(layer, *size) for layer, size in layers.items()}

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys.values(), *self.values.values()))

    def write(self, layer: int, start: int, keys_BHMd: Tensor, values_BHMd: Tensor) -> tuple[Tensor, Tensor]:
        """Store M slots from `start` on and return all slots up to them, (B, H, start + M, d) each."""
        stop = start + keys_BHMd.shape[2]
        assert stop <= self.capacity, f"slot {stop} of {self.capacity}: the target was given too small a cache"
        self.keys[layer][:, :, start:stop] = keys_BHMd
        self.values[layer][:, :, start:stop] = values_BHMd
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def gather(self, slots_K: Tensor, start: int) -> None:
        """Move the scratch slots `slots_K` (ascending) to `start`, `start` + 1, ... in every layer."""
        stop = start + slots_K.shape[0]
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[:, :, start:stop] = tensor[:, :, slots_K.to(tensor.device)]

    def commit(self, slots: int) -> None:
        self.length += slots

    def reset(self) -> None:
        self.length = 0
