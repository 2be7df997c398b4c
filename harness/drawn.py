"""Verdicts that are drawn instead of judged: how many tokens a round of this cost would give at a given acceptance.

Everything is computed as in a real round, the target's own verdict too; only which nodes count as accepted is replaced.
The draws of a text lie on the device before it begins, so a round copies nothing more to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from harness.acceptance import Profile
from harness.draft import Draft, Shape
from harness.verify import Verdict, verdict_at


class Doer(Protocol):
    """What a target does about drafts of one shape."""

    def about(self, shape: Shape, name: str, function: Callable[..., Verdict], /, *inputs: Tensor) -> Verdict: ...


class DrawnVerdicts:
    """Turns the target's verdict on a draft into a drawn one. The same seed draws the same, whatever the method."""

    def __init__(self, profile: Profile, rounds: int, device: torch.device) -> None:
        """`rounds`: a text's rounds at most; later ones, of a warm-up say, begin again."""
        self.profile, self.rounds, self.device = profile, rounds, device
        self._drawn: dict[int, Tensor] = {}
        self.seed(0)

    def seed(self, seed: int) -> None:
        """A new text. What was drawn for the depths of earlier texts is drawn anew here, before a stopwatch runs."""
        self._seed, self._round = seed, 0
        self._drawn = {longest: self._draw(longest) for longest in self._drawn}

    @property
    def chances(self) -> list[float]:
        """By depth, for the deepest draft so far."""
        return list(self.profile.by_depth(max(self._drawn, default=0)))

    def __call__(self, target: Doer, draft: Draft, judged: Verdict) -> Verdict:
        longest = draft.shape.longest
        if longest == 0:
            return judged
        if longest not in self._drawn:
            self._drawn[longest] = self._draw(longest)
        depth = self._drawn[longest][self._round % self.rounds]
        self._round += 1

        def drawn(tokens_N: Tensor, depth: Tensor, bonus: Tensor) -> Verdict:
            return verdict_at(replace(draft, tokens_N=tokens_N), _first_at(draft.shape, depth), bonus)

        return target.about(draft.shape, "drawn", drawn, draft.tokens_N, depth, judged.bonus)

    def _draw(self, longest: int) -> Tensor:
        """How deep each round accepts, (rounds,), for drafts of this depth."""
        uniform_KR = torch.rand(longest, self.rounds, generator=torch.Generator().manual_seed(self._seed))
        taken_KR = uniform_KR < torch.tensor(self.profile.by_depth(longest))[:, None]
        return taken_KR.cumprod(0).sum(0).to(self.device)


def _first_at(shape: Shape, depth: Tensor) -> Tensor:
    """The scored position of the first node at this depth, or at the greatest that the tree has."""
    if shape.chain:
        return depth
    return (shape.depth_M == torch.minimum(depth, shape.depth_M.max())).int().argmax()
