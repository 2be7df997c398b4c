"""Medusa (Cai et al. 2024, arXiv 2401.10774): heads on the last hidden state guess several tokens ahead, a static tree
of their best guesses is verified in one pass.

Head i = residual blocks x + SiLU(W x + b), then an output head; it reads the post-norm hidden state h_t of the last
verified token and predicts t + 2 + i, because the token at t + 1 is already known. Original checkpoints carry an output
head each; ours share the target's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import drafter as checkpoint
from harness.draft import Draft, RankedTree, best_paths
from harness.lesson import Distilled, Lesson
from harness.method import Method, Natural, Options, Positive
from harness.sampling import Sampler
from harness.target import Scores, Target
from harness.trunk import DraftHead, Trunk
from harness.verify import Typical, Verdict


class MedusaOptions(Options, frozen=True, kw_only=True):
    nodes: Natural = 24
    "size of the static tree; 0 drafts a chain of the heads' best guesses"
    heads: Positive | None = None
    "heads used; default: all that the checkpoint has (training: 4)"
    blocks: Positive = 2
    "training: residual blocks a head"
    acceptance: Literal["exact", "typical"] = "exact"
    "typical: the paper's lossy rule, for temperatures above 0"
    drafter: str | None = None
    "checkpoint: file, directory or hub id"


class Heads(nn.Module):
    """i -> residual blocks, with an output head of its own where the checkpoint has one."""

    def __init__(self, count: int, blocks: int, width: int, vocabulary: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(blocks)) for _ in range(count))
        self.outputs = None
        if vocabulary is not None:
            self.outputs = nn.ModuleList(nn.Linear(width, vocabulary, bias=False) for _ in range(count))

    def forward(self, hidden: Tensor, head: DraftHead) -> Tensor:
        """(.., D) -> logits (.., heads, V')."""
        bent = []
        for blocks in self.blocks:
            x = hidden
            for block in blocks:  # type: ignore[attr-defined]
                x = x + F.silu(block(x))
            bent.append(x)
        if self.outputs is None:
            return head.logits(torch.stack(bent, dim=-2))
        return torch.stack([out(x) for out, x in zip(self.outputs, bent, strict=True)], dim=-2)


class Medusa(Method):
    name = "medusa"
    summary = "heads on the last hidden state, a static tree of their guesses"
    source = "Cai et al. 2024, arXiv 2401.10774"
    Options = MedusaOptions
    needs_drafter = True
    taps = (-1,)

    def __init__(
        self, target: Target, heads: Heads, head: DraftHead, guesses: RankedTree, rule: Typical | None
    ) -> None:
        self.target, self.heads, self.head, self.guesses, self.rule = target, heads, head, guesses, rule
        self.hidden_D = torch.zeros(target.trunk.width, device=target.device, dtype=target.trunk.dtype)

    @classmethod
    def load(cls, target: Target, options: MedusaOptions, drafter: Path | None, sampler: Sampler) -> Medusa:
        assert drafter is not None
        if options.acceptance == "typical" and sampler.greedy:
            raise ValueError("typical acceptance compares probabilities: give `--temperature` above 0 or drop it")
        tensors = checkpoint.tensors(drafter)
        config, _ = checkpoint.metadata(drafter)
        head = DraftHead(target.trunk, tensors.pop("vocabulary", None))
        heads = heads_from(tensors, options.heads, head).to(target.device, target.trunk.dtype)
        count = len(heads.blocks)
        chain = [(0,) * depth for depth in range(1, count + 1)]
        accuracy = checkpoint.rank_accuracy(config, count, head.rows)
        paths = best_paths(accuracy, options.nodes) if options.nodes else chain
        guesses = RankedTree.of(paths, target.device)
        return cls(target, heads, head, guesses, Typical() if options.acceptance == "typical" else None)

    @property
    def reach(self) -> int:
        return 1 + len(self.guesses)

    @property
    def drafter_bytes(self) -> int:
        return sum(p.nbytes for p in self.heads.parameters()) + self.head.bytes

    def start(self, tokens: Sequence[int], scores: Scores) -> None:
        self.hidden_D.copy_(scores.hidden[self.target.depth][-1])

    def propose(self, tokens: Sequence[int]) -> Draft:
        return self.target.call("draft", self._draft)

    def _draft(self) -> Draft:
        return self.guesses.draft(self.heads(self.hidden_D, self.head), self.head.tokens)

    def observe(self, draft: Draft, scores: Scores, verdict: Verdict) -> None:
        self.target.call("remember", self._remember, scores.hidden[self.target.depth], verdict.last)

    def _remember(self, hidden_MD: Tensor, last: Tensor) -> None:
        self.hidden_D.copy_(hidden_MD.index_select(0, last.view(1))[0])

    @classmethod
    def trainee(
        cls, trunk: Trunk, options: MedusaOptions, vocabulary_V: Tensor | None, seed_ids: Tensor
    ) -> MedusaTrainee:
        return MedusaTrainee(trunk, options, vocabulary_V)


def heads_from(tensors: dict[str, Tensor], limit: int | None, head: DraftHead) -> Heads:
    """Heads from a checkpoint's tensors: `{i}.{j}.linear.weight|bias` and, with output heads, `{i}.{last}.weight`.

    The heads are counted from the keys: the config.json of the original checkpoints names fewer than there are. Raises
    ValueError for heads that do not fit the target, whose output `head` is, and for a `limit` above their number.
    """
    tensors = {re.sub(r"^medusa_head\.", "", name): tensor for name, tensor in tensors.items()}
    linear = [re.fullmatch(r"(\d+)\.(\d+)\.linear\.weight", name) for name in tensors]
    found = [(int(match[1]), int(match[2])) for match in linear if match]
    if not found:
        raise ValueError("not a Medusa checkpoint: it has no tensor named `0.0.linear.weight`")
    trained, width = 1 + max(i for i, _ in found), head.trunk.width
    count = trained if limit is None else limit
    if count > trained:
        raise ValueError(f"this medusa drafter has {trained} heads: heads={count} is out of range")
    blocks = 1 + max(j for _, j in found)
    own = tensors.get(f"0.{blocks}.weight")
    heads = Heads(count, blocks, width, None if own is None else own.shape[0])
    named = {
        f"blocks.{i}.{j}.{part}": f"{i}.{j}.linear.{part}"
        for i in range(count) for j in range(blocks) for part in ("weight", "bias")
    }  # fmt: skip
    if own is not None:
        named |= {f"outputs.{i}.weight": f"{i}.{blocks}.weight" for i in range(count)}
    if lacking := [name for name in named.values() if name not in tensors]:
        raise ValueError(f"this medusa drafter lacks {lacking[0]}: name a complete one")
    state = {name: tensors[stored] for name, stored in named.items()}
    for name, tensor in state.items():
        if name.startswith("outputs."):
            head.refuse_misfit(tensor)
        elif tensor.shape[0] != width or tensor.shape[-1] != width:
            raise ValueError(
                f"this medusa drafter's heads are {tensor.shape[0]} features wide and the target is {width}: name a "
                "drafter that was trained for this target"
            )
    heads.load_state_dict(state)
    return heads


class MedusaTrainee(Distilled):
    """Medusa-1: the target is frozen, only the heads learn."""

    taps = (-1,)

    def __init__(self, trunk: Trunk, options: MedusaOptions, vocabulary_V: Tensor | None) -> None:
        self.options, self.vocabulary_V = options, vocabulary_V
        self.head = DraftHead(trunk, vocabulary_V)
        self.depths = options.heads or 4
        self.module = self.heads = Heads(self.depths, options.blocks, trunk.width, None).to(trunk.device)
        for block in (block for blocks in self.heads.blocks for block in blocks):  # type: ignore[attr-defined]
            nn.init.zeros_(block.weight)  # every head starts as the target's own next-token head
            nn.init.zeros_(block.bias)

    def logits(self, lesson: Lesson) -> Tensor:
        # The pending token is x_s, so the last verified hidden state is the one at s - 1.
        hidden_BAD = lesson.at(lesson.hidden[lesson.trunk.depth], -1)
        return self.module(hidden_BAD, self.head)  # type: ignore[no-any-return]

    def config(self) -> dict[str, Any]:
        return {"heads": len(self.heads.blocks), "blocks": self.options.blocks}

    def tensors(self) -> dict[str, Tensor]:
        out = {} if self.vocabulary_V is None else {"vocabulary": self.vocabulary_V.int()}
        for name, tensor in self.module.state_dict().items():
            _, i, j, part = name.split(".")
            out[f"{i}.{j}.linear.{part}"] = tensor.bfloat16()
        return out
