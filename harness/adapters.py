"""Low-rank adapters (LoRA, Hu et al. 2021, section 4.1) that are active in some passes only.

They sit beside the target's linear layers, whatever their bits: y = W x + B A x. While inactive they cost one test per
layer and the target is exactly what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.trunk import Trunk


class LoRA(nn.Module):
    """Adapters of one rank for every linear layer of the chosen decoder layers.

    State: `pairs.{layer}/{projection}.a` (rank, in) and `.b` (out, rank), the projection named as in the layer
    (`self_attn/q_proj`). `.b` starts at zero, so a new adapter changes nothing.
    """

    def __init__(self, trunk: Trunk, layers: Iterable[int], rank: int) -> None:
        super().__init__()
        self.rank = rank
        self._on = False
        self.pairs = nn.ModuleDict()
        for layer in layers:
            for name, linear in _linears(trunk.layers[layer]):
                pair = nn.ParameterDict(
                    {
                        "a": nn.Parameter(
                            torch.randn(rank, linear.in_features, device=trunk.device) / linear.in_features**0.5
                        ),
                        "b": nn.Parameter(torch.zeros(linear.out_features, rank, device=trunk.device)),
                    }
                )
                self.pairs[f"{layer}/{name}".replace(".", "/")] = pair
                linear.register_forward_hook(self._hook(pair))

    def _hook(self, pair: nn.ParameterDict):  # type: ignore[no-untyped-def]
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            if not self._on:
                return None
            low = F.linear(inputs[0], pair["a"].to(out)).flatten(0, -2)
            return torch.addmm(out.flatten(0, -2), low, pair["b"].to(out).t()).view_as(out)

        return add

    @contextmanager
    def active(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def deltas(self) -> dict[str, Tensor]:
        """What merging would add to each weight, by its name in the model (`layers.3.mlp.up_proj.weight`)."""
        merged = {}
        pair: Any
        for key, pair in self.pairs.items():
            merged[f"layers.{key.replace('/', '.')}.weight"] = pair["b"] @ pair["a"]
        return merged


def _linears(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """A decoder layer's projections, quantised or not: whatever has in_features and out_features."""
    for name, module in layer.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield name, module
