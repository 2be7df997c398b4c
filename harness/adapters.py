"""Low-rank adapters (LoRA, Hu et al. 2021, section 4.1) beside a model's linear layers, whatever their bits.

y = W x + B A x. The model's own layers stay as they are: an adapted layer is a second module over the same weights, and
a pass runs the one or the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.joined import Joined, adjacent, cut, twin
from harness.trunk import Trunk


class LoRA(nn.Module):
    """Adapters of one rank for every linear layer of the chosen decoder layers; `layers` are those layers, adapted.

    `fixed` are those that run at fixed addresses: `layers`, or after `join` the trunk's joined ones, adapted.

    State: `pairs.{layer}/{projection}.a` (rank, in) and `.b` (out, rank), the projection named as in the layer
    (`self_attn/q_proj`). `.b` starts at zero, so a new adapter changes nothing.
    """

    def __init__(self, trunk: Trunk, layers: Iterable[int], rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.pairs = nn.ModuleDict()
        # Not modules of this one: they hold the model's weights too.
        self.layers: dict[int, nn.Module]
        self.fixed: dict[int, nn.Module]
        object.__setattr__(self, "layers", {})
        object.__setattr__(self, "fixed", self.layers)
        for layer in layers:
            adapted = {}
            for name, linear in _linears(trunk.layers[layer]):
                pair = Pair(linear.in_features, linear.out_features, rank, trunk.device)
                self.pairs[f"{layer}/{name}".replace(".", "/")] = pair
                adapted[name] = Adapted(linear, pair)
            self.layers[layer] = twin(trunk.layers[layer], adapted)

    def join(self, trunk: Trunk) -> None:
        """Adapt the trunk's joined layers too, before anything is captured: plain weights move, and A with them.

        Adapters have the weights' dtype by now, and do not learn or move any more.
        """
        self.requires_grad_(False)
        made = {}
        for layer in self.layers:
            linears = dict(_linears(trunk.layers[layer]))
            adapted: dict[str, nn.Module] = {}
            for name, module in trunk.fixed[layer].named_modules():
                read = module if isinstance(module, Joined) else Joined({name: module}) if name in linears else None
                if read is not None:
                    pairs: list[Any] = [self.pairs[f"{layer}/{each}".replace(".", "/")] for each in read.names]
                    adapted[name] = AdaptedJoined(read, pairs)
            made[layer] = twin(trunk.fixed[layer], adapted)
        object.__setattr__(self, "fixed", made)

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


class AdaptedJoined(nn.Module):
    """What stands for Joined layers with their pairs: every A is read by one product, with the layers' own if plain.

    Every B too of layers of one size that are neighbours, as keys and values are.
    """

    def __init__(self, layers: Joined, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.layers = layers
        rows = [pair.a for pair in pairs]
        self.whole = layers.widen(rows)
        self.a = adjacent(rows) if self.whole is None else self.whole[sum(layers.sizes) :]
        self.rank = pairs[0].a.shape[0]
        self.runs = [(size, len(list(run))) for size, run in groupby(layers.sizes)]
        "sizes of neighbours, and how many are of that size"
        b = iter(pair.b for pair in pairs)
        self.b = [adjacent([next(b) for _ in range(count)]).view(count, size, -1) for size, count in self.runs]

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        x = self.layers.normed(x)
        if self.whole is not None:
            out, low = torch.split(F.linear(x, self.whole), [sum(self.layers.sizes), self.a.shape[0]], dim=-1)
        else:
            out, low = self.layers.product(x), F.linear(x, self.a)
        outs = torch.split(out.flatten(0, -2), [size * count for size, count in self.runs], dim=-1)
        lows = torch.split(low.flatten(0, -2), [self.rank * count for _, count in self.runs], dim=-1)
        added = [self._add(*parts) for parts in zip(outs, lows, self.b, strict=True)]
        out = torch.cat(added, dim=-1).view_as(out) if torch.compiler.is_compiling() else out
        return out if plus is None else plus + out

    def each(self, x: Tensor) -> Sequence[Tensor]:
        return torch.split(self(x), self.layers.sizes, dim=-1)

    def heads(self, x: Tensor, width: int) -> Tensor:
        return cut(self(x), width)

    def _add(self, out: Tensor, low: Tensor, b: Tensor) -> Tensor:
        """B A x, to the part of the output that it belongs to: in place, or compiled, where sums become part of other
        kernels, as a new tensor."""
        count, size, rank = b.shape
        if count == 1:
            return out + F.linear(low, b[0]) if torch.compiler.is_compiling() else out.addmm_(low, b[0].t())
        outs, lows = out.view(-1, count, size).transpose(0, 1), low.view(-1, count, rank).transpose(0, 1)
        b = b.transpose(1, 2)
        if torch.compiler.is_compiling():
            return (outs + torch.bmm(lows, b)).transpose(0, 1).flatten(1)
        return outs.baddbmm_(lows, b)


def _linears(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """A decoder layer's projections, quantised or not: whatever has in_features and out_features."""
    for name, module in layer.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield name, module
