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

DEPTH_DISCOUNT = 0.8
"weight of depth j is this to the power j: a late guess counts only if all before it were right"
HARD_SHARE = 0.5
"share of the loss that asks for the target's first choice, which is what greedy decoding accepts"


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
    teacher_BAKV: Tensor
    "the target's logits over the draft vocabulary at s + j"
    choice_BAK: Tensor
    "row in the draft vocabulary of the token at s + 1 + j, or -100 where it has none"

    def at(self, values_BTX: Tensor, offset: int) -> Tensor:
        """Rows of (B, T, ..) at anchor + offset, (B, A, ..)."""
        index_BA = self.anchors_BA + offset
        return values_BTX[torch.arange(index_BA.shape[0], device=index_BA.device)[:, None], index_BA]


class Trainee(Protocol):
    """What a method gives the training loop: modules, what they predict, and their loss on a batch."""

    module: nn.Module
    taps: tuple[int, ...]
    depths: int

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser; `scale` multiplies the learning rate."""

    def logits(self, lesson: Lesson) -> Tensor:
        """(B, A, K, V') for depths 0 .. K-1."""

    def loss(self, lesson: Lesson) -> Tensor:
        """A scalar."""

    def config(self) -> dict[str, Any]:
        """What the checkpoint has to say for the method to load it."""

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint."""


class Distilled:
    """The usual trainee: one learning rate, and the target's distribution as the only goal."""

    module: nn.Module
    taps: tuple[int, ...] = ()
    depths: int

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "scale": 1.0}]

    def logits(self, lesson: Lesson) -> Tensor:
        raise NotImplementedError

    def loss(self, lesson: Lesson) -> Tensor:
        return distil(self.logits(lesson), lesson)


def distil(logits_BAKV: Tensor, lesson: Lesson) -> Tensor:
    """Cross-entropy against the target's distribution and its first choice, discounted by depth."""
    depths = logits_BAKV.shape[2]
    student = torch.log_softmax(logits_BAKV.float(), dim=-1)
    teacher = torch.softmax(lesson.teacher_BAKV[:, :, :depths].float(), dim=-1)
    soft_BAK = -(teacher * student).sum(-1)
    choice_BAK = lesson.choice_BAK[:, :, :depths]
    hard_BAK = -student.gather(-1, choice_BAK.clamp_min(0)[..., None])[..., 0] * (choice_BAK >= 0)
    weight_K = DEPTH_DISCOUNT ** torch.arange(depths, device=student.device)
    per_depth_K = ((1 - HARD_SHARE) * soft_BAK + HARD_SHARE * hard_BAK).mean((0, 1))
    return (weight_K * per_depth_K).sum() / weight_K.sum()
