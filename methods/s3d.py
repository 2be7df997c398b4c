"""S3D: Skippy Simultaneous Speculative Decoding (Zhong & Bharadwaj, arXiv 2405.20314), after the paper's description.

One round:
    draft   ONE pass of [x_t, M_1 .. M_k] through the first m and the last n layers; slot 0 gives d_1, mask j d_{j+1}
    verify  [x_t, d_1 .. d_gamma] through all layers, gamma = k + 1

The weights are owned in one of two ways. `gated`: the target is frozen, and mask embeddings and a LoRA on the drafting
layers are active in the draft pass only, so the output is exactly the target's. `shared` (the paper's): the fine-tuned
weights ARE the target, no byte is added but the mask embeddings, and the baseline is `ar` on the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness import drafter as checkpoint
from harness.adapters import LoRA
from harness.attention import ContextView, FreshView
from harness.cache import KVCache
from harness.draft import Draft, Drawn, LikeliestTree, RankedTree, best_paths, chain
from harness.errors import UserError
from harness.lesson import Distilled, Lesson, distil
from harness.method import Method, Natural, Options, Positive
from harness.sampling import Sampler
from harness.target import Target
from harness.trunk import DraftHead, Layers, Trunk

CANDIDATES = 128
"of which a dynamic tree chooses at least; torch sorts so many by one kernel"


class S3DOptions(Options, frozen=True, kw_only=True):
    k: Natural | None = None
    "mask tokens, so gamma = k + 1 tokens are drafted; default: as many as were trained"
    keep: tuple[int, int] | None = None
    "layers that draft, front+back (a checkpoint is trained for one choice, its default)"
    mode: Literal["gated", "shared"] = "gated"
    "gated: frozen target, LoRA in the draft pass; shared: the LoRA merged into the target"
    nodes: Natural = 0
    "size of a tree of each slot's best guesses, verified at once; 0 drafts the paper's chain"
    tree: Literal["static", "dynamic"] = "static"
    "static: the guesses that were right most often in training; dynamic: of at least 128 of those, the likeliest now"
    rank: Positive = 64
    "training: rank of the LoRA"
    drafter: str | None = None
    "checkpoint: file, directory or hub id"

    def __post_init__(self) -> None:
        if self.tree == "dynamic" and not self.nodes:
            raise ValueError("tree=dynamic chooses the nodes of a tree: add nodes=32, say, or drop it")


class S3D(Method):
    name = "s3d"
    summary = "the target's own outer layers draft several tokens in one pass"
    source = "Zhong & Bharadwaj 2024, arXiv 2405.20314"
    Options = S3DOptions
    needs_drafter = True

    def __init__(
        self,
        target: Target,
        masks_KD: Tensor,
        layers: Layers,
        lora: LoRA | None,
        head: DraftHead,
        guesses: RankedTree | LikeliestTree | None,
        sampler: Sampler,
    ) -> None:
        """`lora` is None where it is merged into the target; `guesses` is None for a chain."""
        self.target, self.masks_KD, self.layers, self.lora = target, masks_KD, layers, lora
        self.head, self.guesses, self.sampler = head, guesses, sampler

    @classmethod
    def target_weights(cls, options: S3DOptions) -> str:
        return "base" if options.mode == "gated" else cls.drafter_name(options)

    @classmethod
    def drafter_name(cls, options: S3DOptions) -> str:
        return cls.name if options.mode == "gated" else f"{cls.name}-shared"

    @classmethod
    def deltas(cls, drafter: Path, depth: int) -> dict[str, Tensor]:
        config, _ = checkpoint.metadata(drafter)
        if config.get("mode") != "shared":
            raise UserError(
                f"the s3d drafter {drafter} was trained for mode={config.get('mode')}, whose LoRA is no part of the "
                "target: name one that was trained for mode=shared"
            )
        tensors, (front, back) = checkpoint.tensors(drafter), config["keep"]
        names = {name.removesuffix(".a") for name in tensors if name.endswith(".a")}
        adapted = {int(name.removeprefix("pairs.").partition("/")[0]) for name in names}
        if adapted != {*Layers.ends(front, back, depth).indices}:
            raise UserError(
                f"the s3d drafter {drafter} was trained for a model of another depth than this one's {depth} layers: "
                "name another drafter"
            )
        return {
            f"layers.{name.removeprefix('pairs.').replace('/', '.')}.weight": (
                tensors[f"{name}.b"].float() @ tensors[f"{name}.a"].float()
            )
            for name in sorted(names)
        }

    @classmethod
    def load(cls, target: Target, options: S3DOptions, drafter: Path | None, sampler: Sampler) -> S3D:
        assert drafter is not None
        config, _ = checkpoint.metadata(drafter)
        if "mode" not in config:
            raise ValueError(f"{drafter} is no S3D checkpoint: name another drafter")
        if config["mode"] != options.mode:
            raise ValueError(f"{drafter} was trained for mode={config['mode']}: say so, or name another drafter")
        tensors = checkpoint.tensors(drafter)
        front, back = config["keep"]
        if options.keep not in (None, (front, back)):
            raise ValueError(f"this s3d drafter was trained to draft with layers {front}+{back}: drop `keep`")
        masks_KD = tensors.pop("masks").to(target.device, target.trunk.dtype)
        if masks_KD.shape[1] != target.trunk.width:
            raise ValueError(
                f"this s3d drafter's masks have {masks_KD.shape[1]} features and the target {target.trunk.width}: name "
                "one that was trained for it"
            )
        k = masks_KD.shape[0] if options.k is None else options.k
        if k > masks_KD.shape[0]:
            raise ValueError(f"this s3d drafter has {masks_KD.shape[0]} mask tokens: k={k} is out of range")
        layers = Layers.ends(front, back, target.depth)
        head = DraftHead(target.trunk, tensors.pop("vocabulary", None))
        lora = None
        if options.mode == "gated":
            lora = LoRA(target.trunk, layers.indices, config["rank"])
            checkpoint.refuse_misfit(lora.state_dict(), tensors, cls.name)
            lora.load_state_dict(tensors)
            lora.to(target.device, target.trunk.dtype)
            if target.runtime.joins:
                lora.join(target.trunk)
        guesses = None
        if options.nodes:
            accuracy = checkpoint.rank_accuracy(config, k + 1, head.rows)
            guesses = tree_of(accuracy, options.nodes, options.tree == "dynamic", target.device)
        return cls(target, masks_KD[:k], layers, lora, head, guesses, sampler)

    @property
    def reach(self) -> int:
        scored = self.masks_KD.shape[0] + 1 if self.guesses is None else len(self.guesses)
        return 1 + max(scored, self.masks_KD.shape[0])

    @property
    def drafter_bytes(self) -> int:
        adapters = 0 if self.lora is None else sum(p.nbytes for p in self.lora.parameters())
        return self.masks_KD.nbytes + adapters + self.head.bytes

    def propose(self, tokens: Sequence[int]) -> Draft:
        return self.target.call("draft", self._draft)

    def _draft(self) -> Draft:
        slots = torch.cat((self.target.trunk.embed(self.target.pending_1), self.masks_KD))
        hidden = self.target.peek(slots, layers=self.layers, adapters=self.lora)
        logits = self.head.logits(hidden)
        if self.guesses is not None:
            return self.guesses.draft(logits, self.head.tokens, self.target.runtime.compiled)
        shape = chain(logits.shape[0], self.target.device)
        if self.sampler.greedy:
            return Draft(self.head.tokens(logits.argmax(-1)), shape)
        q = self.sampler.distribution(logits)
        rows = torch.arange(q.shape[0], device=q.device)
        return Draft(self.head.tokens(self.sampler.draw(q)), shape, Drawn.IID, q, rows, self.head.ids_V)

    @classmethod
    def trainee(cls, trunk: Trunk, options: S3DOptions, vocabulary_V: Tensor | None, seed_ids: Tensor) -> S3DTrainee:
        return S3DTrainee(trunk, options, vocabulary_V, seed_ids)


def tree_of(
    accuracy: Sequence[Sequence[float]], nodes: int, dynamic: bool, device: torch.device
) -> RankedTree | LikeliestTree:
    """The `nodes` best paths, where accuracy[i][r] is how often guess r for depth i is right, or a choice of more."""
    candidates = best_paths(accuracy, max(CANDIDATES, 2 * nodes) if dynamic else nodes)
    whole = RankedTree.of(candidates, device)
    return LikeliestTree(whole, nodes) if nodes < len(whole) else whole


class S3DTrainee(Distilled):
    """Mask embeddings and LoRA; groups [x_s, M_1 .. M_k] see the verified positions before s and their own group."""

    def __init__(self, trunk: Trunk, options: S3DOptions, vocabulary_V: Tensor | None, seed_ids: Tensor) -> None:
        self.options, self.trunk, self.vocabulary_V = options, trunk, vocabulary_V
        self.k = 4 if options.k is None else options.k
        self.depths = self.k + 1
        self.keep = options.keep or (round(trunk.depth * 0.4 / 3), round(trunk.depth * 0.4 * 2 / 3))
        self.layers = Layers.ends(*self.keep, trunk.depth)
        self.head = DraftHead(trunk, vocabulary_V)
        # A mask token starts as the mean of the words that occur, so that the first layers know its scale.
        mean_D = trunk.embed(seed_ids).float().mean(0)
        self.lora = LoRA(trunk, self.layers.indices, options.rank)
        self.masks = nn.Parameter(
            mean_D.repeat(self.k, 1) + 0.01 * torch.randn(self.k, trunk.width, device=trunk.device)
        )
        self.module = nn.Module()
        self.module.lora, self.module.masks = self.lora, self.masks

    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: the few mask embeddings learn faster than the LoRA."""
        return [{"params": list(self.lora.parameters()), "scale": 1.0}, {"params": [self.masks], "scale": 5.0}]

    def logits(self, lesson: Lesson) -> Tensor:
        return self._draft(lesson, lesson.cache if self.options.mode == "gated" else self._whole(lesson)[1])

    def loss(self, lesson: Lesson) -> Tensor:
        """Shared weights learn to draft and, at full depth, to stay what they were."""
        if self.options.mode == "gated":
            return distil(self._draft(lesson, lesson.cache), lesson)
        hidden_BTD, context = self._whole(lesson)
        verify_BAKD = torch.stack([lesson.at(hidden_BTD, depth) for depth in range(self.depths)], dim=2)
        return distil(self._draft(lesson, context), lesson) + distil(self.head.logits(verify_BAKD), lesson)

    def _whole(self, lesson: Lesson) -> tuple[Tensor, FreshView]:
        """The fine-tuned target at full depth: hidden states, and the keys and values that drafting reads."""
        positions_T = torch.arange(lesson.ids_BT.shape[1], device=self.trunk.device)
        view = FreshView(None, 0, positions_T, None, self.trunk.windows)
        hidden_BTD, _ = self.trunk.run(self.trunk.embed(lesson.ids_BT), positions_T, view, instead=self.lora.layers)
        return hidden_BTD, view

    def _draft(self, lesson: Lesson, context: KVCache | FreshView) -> Tensor:
        trunk, size = self.trunk, self.k + 1
        batch, anchors = lesson.anchors_BA.shape
        roots_BA1D = trunk.embed(lesson.at(lesson.ids_BT, 0))[:, :, None]
        masks_BAKD = self.masks.to(trunk.dtype).expand(batch, anchors, -1, -1)
        slots_BQD = torch.cat((roots_BA1D, masks_BAKD), dim=2).flatten(1, 2)
        offsets = torch.arange(size, device=trunk.device)
        positions_BQ = (lesson.anchors_BA[:, :, None] + offsets).flatten(1)
        mask_B1QS = group_mask(lesson.anchors_BA, lesson.ids_BT.shape[1], size)
        view = ContextView(context, mask_B1QS, positions_BQ, trunk.windows)
        hidden_BQD, _ = trunk.run(slots_BQD, positions_BQ, view, layers=self.layers, instead=self.lora.layers)
        return self.head.logits(hidden_BQD).view(batch, anchors, size, -1)

    def config(self) -> dict[str, Any]:
        return {"keep": list(self.keep), "k": self.k, "rank": self.options.rank, "mode": self.options.mode}

    def tensors(self) -> dict[str, Tensor]:
        extra = {} if self.vocabulary_V is None else {"vocabulary": self.vocabulary_V.int()}
        lora = {name: tensor.bfloat16() for name, tensor in self.lora.state_dict().items()}
        return {"masks": self.masks.detach().bfloat16(), **lora, **extra}


def group_mask(anchors_BA: Tensor, context: int, size: int) -> Tensor:
    """(B, 1, A * size, context + A * size): a group sees the context before its anchor and itself, causally."""
    anchors = anchors_BA.shape[1]
    query_group = torch.arange(anchors * size, device=anchors_BA.device) // size
    before_BAT = torch.arange(context, device=anchors_BA.device) < anchors_BA[:, :, None]
    same_QQ = (query_group[:, None] == query_group).tril()
    own_BQQ = same_QQ.expand(anchors_BA.shape[0], -1, -1)
    return torch.cat((before_BAT.repeat_interleave(size, dim=1), own_BQQ), dim=2)[:, None]
