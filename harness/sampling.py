"""How the target's distribution is turned into tokens: temperature, top-p and the random numbers of one trial."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampler:
    """Greedy at temperature 0, otherwise top-p sampling at a temperature, with a generator of its own.

    Drafters use the same object, so q is always the distribution that a draft was really drawn from.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"a temperature of {self.temperature} means nothing: give 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"a top-p of {self.top_p} keeps nothing: give more than 0 and at most 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def distribution(self, logits_MV: Tensor) -> Tensor:
        """Probabilities after temperature and top-p, (M, V) in float32 (float64 stays). Undefined when greedy."""
        wide = logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
        p_MV = torch.softmax(wide / self.temperature, dim=-1)
        if self.top_p >= 1.0:
            return p_MV
        sorted_MV, order_MV = p_MV.sort(dim=-1, descending=True)
        # The smallest set whose mass reaches top_p: a token stays while the mass before it is below top_p.
        before_MV = sorted_MV.cumsum(-1) - sorted_MV
        sorted_MV = sorted_MV.masked_fill(before_MV >= self.top_p, 0.0)
        p_MV = torch.zeros_like(p_MV).scatter_(-1, order_MV, sorted_MV)
        return p_MV / p_MV.sum(-1, keepdim=True)

    def draw(self, p_MV: Tensor) -> Tensor:
        """One token a row, (M,). A Gumbel race: no host synchronisation, zero-probability tokens never win."""
        noise_MV = torch.empty_like(p_MV).exponential_(generator=self.generator)
        return (p_MV / noise_MV.clamp_min(torch.finfo(p_MV.dtype).tiny)).argmax(-1)

    def uniform(self, size: int, like: Tensor) -> Tensor:
        """`size` uniform numbers on the device and in the dtype of `like`."""
        return torch.rand(size, generator=self.generator, device=like.device, dtype=like.dtype)

    def pick(self, logits_MV: Tensor) -> Tensor:
        """The next token of each row, (M,): argmax when greedy, otherwise a draw."""
        return logits_MV.argmax(-1) if self.greedy else self.draw(self.distribution(logits_MV))
