"""Speculative decoding with a small draft model (Leviathan et al. 2023, arXiv 2211.17192; Chen et al., 2302.01318).

The draft model is a second Target with a cache of its own. The shipped one has two layers and shares the target's
embedding and head; any causal language model of the same vocabulary can be named instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import drafter as checkpoint
from harness.attention import FreshView
from harness.draft import Draft, Drawn, chain
from harness.lesson import Distilled, Lesson
from harness.method import Method, Options, Positive
from harness.sampling import Sampler
from harness.target import Scores, Target
from harness.trunk import DraftHead, Trunk, cut_model
from harness.verify import Accepted


class DraftModelOptions(Options, frozen=True, kw_only=True):
    gamma: Positive = 4
    "tokens drafted a round"
    drafter: str | None = None
    "a checkpoint of `harness train`, or a whole causal language model (directory or hub id)"
    layers: Positive = 2
    "training: decoder layers"
    intermediate: Positive | None = None
    "training: width of the MLPs; default: half the target's"


class DraftModel(Method):
    name = "draft-model"
    summary = "a small model of the same vocabulary drafts token by token"
    source = "Leviathan et al. 2023, arXiv 2211.17192"
    Options = DraftModelOptions
    needs_drafter = True

    def __init__(
        self, target: Target, draft: Target, head: DraftHead, own_bytes: int, gamma: int, sampler: Sampler
    ) -> None:
        self.target, self.draft, self.head = target, draft, head
        self.own_bytes, self.gamma, self.sampler = own_bytes, gamma, sampler

    @classmethod
    def load(cls, target: Target, options: DraftModelOptions, drafter: Path | None, sampler: Sampler) -> DraftModel:
        assert drafter is not None
        config, _ = checkpoint.metadata(drafter)
        if "layers" not in config:
            if not drafter.is_dir():
                raise ValueError(f"{drafter} is no draft-model checkpoint: name another, or a model's directory")
            draft = target.companion(drafter)
            weights = sum(p.nbytes for p in draft.trunk.model.parameters())
            return cls(target, draft, DraftHead(draft.trunk, None), weights, options.gamma, sampler)
        tensors = checkpoint.tensors(drafter)
        head = DraftHead(target.trunk, tensors.pop("vocabulary", None))
        model = cut_model(target.trunk, config["layers"], config["intermediate"])
        own = {name: t for name, t in model.model.state_dict().items() if name.startswith(("layers.", "norm."))}
        checkpoint.refuse_misfit(own, tensors, cls.name)
        model.model.load_state_dict(tensors, strict=False)
        for part in (model.model.layers, model.model.norm):  # the rest is the target's, which nothing may change
            part.to(target.device, target.trunk.dtype)
        draft = target.beside(model)
        weights = sum(p.nbytes for name, p in model.model.named_parameters() if name in tensors)
        return cls(target, draft, head, weights + head.bytes, options.gamma, sampler)

    @property
    def reach(self) -> int:
        return 2 + self.gamma

    @property
    def drafter_bytes(self) -> int:
        return self.own_bytes + self.draft.cache.bytes

    def start(self, tokens: Sequence[int], scores: Scores) -> None:
        self.draft.prefill(tokens[:-1])

    def propose(self, tokens: Sequence[int]) -> Draft:
        unread_M = torch.tensor(tokens[self.draft.length :], device=self.target.device)
        ids: list[Tensor] = []
        qs: list[Tensor] = []
        for step in range(self.gamma):
            read, at = (ids[-1], step - 1) if step else (unread_M, 0)
            drafted_1, q_1V = self.draft.call(("step", step), partial(self._step, at), read)
            if not step:
                self.draft.cache.commit(len(unread_M))
            ids.append(drafted_1)
            qs.append(q_1V)
        shape = chain(self.gamma, self.target.device)
        if self.sampler.greedy:
            return Draft(torch.cat(ids), shape)
        rows = torch.arange(self.gamma, device=self.target.device)
        return Draft(torch.cat(ids), shape, Drawn.IID, torch.cat(qs), rows, self.head.ids_V)

    def _step(self, at: int, ids_M: Tensor) -> tuple[Tensor, Tensor]:
        """The next token and the logits, or when sampling the distribution, that it was chosen by."""
        logits_1V = self.head.logits(self.draft.peek(ids_M, at=at)[-1:])
        if self.sampler.greedy:
            return self.head.tokens(logits_1V.argmax(-1)), logits_1V
        q_1V = self.sampler.distribution(logits_1V)
        return self.head.tokens(self.sampler.draw(q_1V)), q_1V

    def settle(self, draft: Draft, accepted: Accepted) -> None:
        """Keep what the draft model has read and the target has accepted; its last guess it has not read."""
        self.draft.cache.commit(min(len(accepted.nodes), self.gamma - 1))

    @classmethod
    def trainee(
        cls, trunk: Trunk, options: DraftModelOptions, vocabulary_V: Tensor | None, seed_ids: Tensor
    ) -> DraftModelTrainee:
        return DraftModelTrainee(trunk, options, vocabulary_V)


class DraftModelTrainee(Distilled):
    """A few layers that read the same embedding and the same head."""

    depths = 4

    def __init__(self, trunk: Trunk, options: DraftModelOptions, vocabulary_V: Tensor | None) -> None:
        self.options, self.vocabulary_V = options, vocabulary_V
        self.intermediate = options.intermediate or trunk.config.intermediate_size // 2
        self.small = Trunk(cut_model(trunk, options.layers, self.intermediate))
        self.head = DraftHead(trunk, vocabulary_V)
        # Only what is trained becomes float32: the embedding and the head are the target's own.
        self.module = torch.nn.ModuleList([*self.small.layers, self.small.body.norm]).float()
        self.module.requires_grad_(True)

    def logits(self, lesson: Lesson) -> Tensor:
        embedded_BTD = lesson.trunk.embed(lesson.ids_BT)
        positions_T = torch.arange(embedded_BTD.shape[1], device=embedded_BTD.device)
        view = FreshView(None, 0, positions_T, None, self.small.windows)
        hidden_BTD, _ = self.small.run(embedded_BTD, positions_T, view)
        picked = torch.stack([lesson.at(hidden_BTD, depth) for depth in range(self.depths)], dim=2)
        return self.head.logits(picked)

    def config(self) -> dict[str, Any]:
        return {"layers": self.options.layers, "intermediate": self.intermediate}

    def tensors(self) -> dict[str, Tensor]:
        extra = {} if self.vocabulary_V is None else {"vocabulary": self.vocabulary_V.int()}
        own = {f"layers.{i}.{n}": t for i, layer in enumerate(self.small.layers) for n, t in layer.state_dict().items()}
        own |= {f"norm.{name}": tensor for name, tensor in self.small.body.norm.state_dict().items()}
        return {name: tensor.bfloat16() for name, tensor in own.items()} | extra
