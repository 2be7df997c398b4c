"""A preallocated key-value cache: committed slots, then scratch slots that nobody has to clean up.

Shapes: B batch, H key-value heads, S slots, d head width. Slot i < length holds position i. A forward writes its keys
and values from slot `length` (or beyond) on; only `commit` moves `length`, so what was not committed was never there.

A captured graph cannot read the host. A cache with `fixed` addresses therefore keeps its length on the device too, and
short forwards over it look at the first `span` slots, of which there are few different numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Compiled = Callable[[Callable[..., Any]], Callable[..., Any]]
"what a runtime makes of a function of tensors"


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class KVCache:
    """Keys and values of some layers, all of the same shape. `layers` says on which device each of them lives.

    `keys[layer]` and `values[layer]`, (B, H, S, d), and `both[layer]`, (2, B, H, S, d), are views of one tensor a
    device, so that moving slots is one operation whatever the number of layers.
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
        self.capacity, self.dtype = capacity, dtype
        self.length = 0
        self.scratch = 0
        "longest forward, in slots beyond the length, that runs at fixed addresses"
        self.compiled: Compiled = as_it_is
        self._length: Tensor | None = None
        self.both: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._stores: list[Tensor] = []
        for device in dict.fromkeys(layers.values()):
            mine = [layer for layer, where in layers.items() if where == device]
            store = torch.zeros(2, len(mine), batch, heads, capacity, width, device=device, dtype=dtype)
            self.both |= {layer: store[:, place] for place, layer in enumerate(mine)}
            self.keys |= {layer: self.both[layer][0] for layer in mine}
            self.values |= {layer: self.both[layer][1] for layer in mine}
            self._stores.append(store)

    @property
    def bytes(self) -> int:
        return sum(store.nbytes for store in self._stores)

    @property
    def fixed(self) -> bool:
        """Whether short forwards run at fixed addresses."""
        return self._length is not None

    def fix(self, scratch: int, compiled: Compiled = as_it_is) -> None:
        """From now on forwards that end within `scratch` slots of the length run at fixed addresses."""
        self.scratch, self.compiled = scratch, compiled
        self._length = torch.zeros((), dtype=torch.long, device=self._stores[0].device)

    @property
    def here(self) -> int | Tensor:
        """The committed length: on the device, (), where addresses are fixed."""
        return self.length if self._length is None else self._length

    @property
    def span(self) -> int:
        """Slots that a forward at fixed addresses looks at."""
        return min(bucket(self.length + self.scratch), self.capacity)

    def reaching(self, scratch: int) -> int:
        """Slots that forwards look at which end `scratch` slots beyond the length."""
        stop = self._up_to(self.length + scratch)
        return stop if self._length is None else self.span

    def positions(self, at: int, size: int) -> Tensor:
        """Positions of the slots from `at` beyond the length on, (size,)."""
        device = self._stores[0].device
        if self._length is None:
            return torch.arange(self.length + at, self.length + at + size, device=device)
        return torch.arange(at, at + size, device=device) + self._length

    def write(self, layer: int, start: int, keys_BHMd: Tensor, values_BHMd: Tensor) -> tuple[Tensor, Tensor]:
        """Store M slots from `start` on and return all slots up to them, (B, H, start + M, d) each."""
        stop = self._up_to(start + keys_BHMd.shape[2])
        self.keys[layer][:, :, start:stop] = keys_BHMd
        self.values[layer][:, :, start:stop] = values_BHMd
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def _up_to(self, stop: int) -> int:
        assert stop <= self.capacity, f"slot {stop} of {self.capacity}: the target was given too small a cache"
        return stop

    def gather(self, offsets_K: Tensor) -> None:
        """Move the scratch slots at `offsets_K` (ascending, from 1) beyond the length to 1, 2, ... beyond it."""
        slots_K, goals_K = offsets_K + self.here, self.positions(1, offsets_K.shape[0])
        for store in self._stores:
            moved = store.index_select(-2, slots_K.to(store.device))
            store.index_copy_(-2, goals_K.to(store.device), moved)

    def following(self, size: int) -> list[Tensor]:
        """The `size` slots from 1 beyond the length on, where `gather` moves others, of every device."""
        return [store.narrow(-2, self.length + 1, size) for store in self._stores]

    def commit(self, slots: int) -> None:
        self._move(self.length + slots)

    def reset(self) -> None:
        self._move(0)

    def _move(self, length: int) -> None:
        self.length = length
        if self._length is not None:
            self._length.fill_(length)


def bucket(slots: int) -> int:
    """`slots` rounded up, by an eighth at most beyond 2048 and to a multiple of 256 below."""
    step = max(256, 1 << max(0, (slots - 1).bit_length() - 4))
    return -(-slots // step) * step
