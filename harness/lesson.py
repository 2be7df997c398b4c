"""What a drafter learns from: one batch of the target's own text with everything the target thought about it.

Every method predicts the same thing. At an anchor s, x_s is the pending token, positions up to s - 1 are verified, and
depth j = 0 .. K-1 is the token at s + 1 + j; the teacher is the target's own distribution at position s + j. Shapes: B
sequences, T tokens, A anchors a sequence, K depths, D hidden width, V' draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from harness.cache import KVCache
from harness.trunk import Trunk


@dataclass(frozen=True)
class Lesson:
    """One batch."""

    ids_BT: Tensor
    anchors_BA: Tensor
    hidden: dict[int, Tensor]
    "tap -> (B, T, D), numbered as transformers' `hidden_states`"
    cache: KVCache
    "the target's own keys and values of every layer, (B, H, T, d)"
    trunk: Trunk

    def at(self, values_BTX: Tensor, offset: int) -> Tensor:
        """Rows of (B, T, ..) at anchor + offset, (B, A, ..)."""
        index_BA = self.anchors_BA + offset
        return values_BTX[torch.arange(index_BA.shape[0], device=index_BA.device)[:, None], index_BA]


class Trainee(Protocol):
    """What a method gives the training loop: modules, and what they predict."""

    module: nn.Module
    taps: tuple[int, ...]
    vocabulary_V: Tensor | None
    "ids of the draft vocabulary, or None for the target's own"

    def logits(self, lesson: Lesson) -> Tensor:
        """(B, A, K, V') for depths 0 .. K-1."""

    def config(self) -> dict[str, Any]:
        """What the checkpoint has to say for the method to load it."""

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint."""
