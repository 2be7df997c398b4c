"""Low-rank adapters (LoRA, Hu et al. 2021, section 4.1) beside a model's linear layers, whatever their bits.

y = W x + B A x. The model's own layers are not touched: an adapted layer is a second module over the same weights, and
a pass runs the one or the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.trunk import Trunk


class LoRA(nn.Module):
    """Adapters of one rank for every linear layer of the chosen decoder layers; `layers` are those layers, adapted.

    State: `pairs.{layer}/{projection}.a` (rank, in) and `.b` (out, rank), the projection named as in the layer
    (`self_attn/q_proj`). `.b` starts at zero, so a new adapter changes nothing.
    """

    def __init__(self, trunk: Trunk, layers: Iterable[int], rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.pairs = nn.ModuleDict()
        # Not modules of this one: they hold the model's weights too.
        self.layers: dict[int, nn.Module]
        object.__setattr__(self, "layers", {})
        for layer in layers:
            adapted = {}
            for name, linear in _linears(trunk.layers[layer]):
                pair = Pair(linear.in_features, linear.out_features, rank, trunk.device)
                self.pairs[f"{layer}/{name}".replace(".", "/")] = pair
                adapted[name] = Adapted(linear, pair)
            self.layers[layer] = _with(trunk.layers[layer], adapted)

    def deltas(self) -> dict[str, Tensor]:
        """What merging would add to each weight, by its name in the model (`layers.3.mlp.up_proj.weight`)."""
        return {f"layers.{key.replace('/', '.')}.weight": pair.b @ pair.a for key, pair in self.pairs.items()}  # type: ignore[operator]


class Pair(nn.Module):
    """A and B of one linear layer."""

    def __init__(self, width: int, out: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, width, device=device) / width**0.5)
        self.b = nn.Parameter(torch.zeros(out, rank, device=device))


class Adapted(nn.Module):
    """A linear layer and its pair."""

    def __init__(self, linear: nn.Module, pair: Pair) -> None:
        super().__init__()
        self.linear, self.pair = linear, pair

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        low = F.linear(x, self.pair.a.to(out)).flatten(0, -2)
        return torch.addmm(out.flatten(0, -2), low, self.pair.b.to(out).t()).view_as(out)


def _linears(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """A decoder layer's projections, quantised or not: whatever has in_features and out_features."""
    for name, module in layer.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield name, module


def _with(module: nn.Module, replaced: dict[str, Adapted], prefix: str = "") -> nn.Module:
    """A module like this one over the same weights, with some of its descendants replaced."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # accelerate's, over several devices: it would call the module copied from
    children = {}
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        children[name] = replaced.get(path) or _with(child, replaced, f"{path}.")
    twin.__dict__["_modules"] = children
    return twin
