"""A preallocated key-value cache: committed slots, then scratch slots that nobody has to clean up.

Shapes: B batch, H key-value heads, S slots, d head width. Slot i < length holds position i. A forward writes its keys
and values from slot `length` (or beyond) on; only `commit` moves `length`, so what was not committed was never there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class KVCache:
    """Keys and values of some layers, all of the same shape. `layers` says on which device each of them lives.

    `keys[layer]` and `values[layer]` are views, (B, H, S, d), of one tensor a device, so that moving slots is one
    operation whatever the number of layers.
    """

    def __init__(
        self,
        layers: Mapping[int, torch.device],
        capacity: int,
        *,
        heads: int,
        width: int,
        dtype: torch.dtype,
        batch: int = 1,
    ) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._stores: list[Tensor] = []
        for device in dict.fromkeys(layers.values()):
            mine = [layer for layer, where in layers.items() if where == device]
            store = torch.zeros(2, len(mine), batch, heads, capacity, width, device=device, dtype=dtype)
            self.keys |= {layer: store[0, place] for place, layer in enumerate(mine)}
            self.values |= {layer: store[1, place] for place, layer in enumerate(mine)}
            self._stores.append(store)

    @property
    def bytes(self) -> int:
        return sum(store.nbytes for store in self._stores)

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
        for store in self._stores:
            store[..., start:stop, :] = store.index_select(-2, slots_K.to(store.device))

    def commit(self, slots: int) -> None:
        self.length += slots

    def reset(self) -> None:
        self.length = 0
