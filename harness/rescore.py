"""Float64, in which a difference between two greedy texts is judged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from harness.target import Target


class Float64:
    """A float64 copy of a model, made when the first difference has to be judged, or the model where it is float64.

    transformers keeps a few steps in float32 (norms, rotations), so logits are right to about 1e-6 of their size.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.copy: Target | None = None

    @torch.inference_mode()
    def gap(self, ids_T: Sequence[int], one: int, other: int) -> float:
        """How far the worse of two tokens is below the best logit after `ids_T`."""
        if self.copy is None:
            precise = self.model.dtype == torch.float64
            self.copy = Target(self.model if precise else copy.deepcopy(self.model).double(), capacity=1)
        with self.copy.lent() as model:
            logits_V = model(torch.tensor([list(ids_T)], device=self.copy.device), use_cache=False).logits[0, -1]
        return float(logits_V.max() - logits_V[[one, other]].min())
