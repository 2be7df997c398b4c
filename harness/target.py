"""The target: the model whose output must not change, with its cache. A draft model is a second Target.

A round is `score` (one pass over the pending token and the draft), `verify` (elsewhere) and `keep` (commit the accepted
path). `peek` runs a cheap pass in the scratch slots and leaves nothing behind. Shape letters: `harness.draft`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.adapters import LoRA
from harness.attention import INTERFACE, CacheView
from harness.draft import Draft
from harness.trunk import Layers, Trunk, horizon
from harness.verify import Verdict


@dataclass(frozen=True)
class Scores:
    """What one pass of the whole model gave. Valid until the target's next call.

    logits_MV at the scored positions (prefill and extend: at the last one only, M = 1); hidden[tap] holds the hidden
    states of every position of the pass, (M or T, D), numbered as transformers' `hidden_states`.
    """

    logits_MV: Tensor
    hidden: dict[int, Tensor]


class Target:
    """A causal language model with a preallocated cache, decoding one sequence."""

    def __init__(self, model: Any, *, capacity: int) -> None:
        """Raises ValueError for a model that cannot be walked, or not this far."""
        self.trunk = Trunk(model)
        longest = horizon(model.config)
        if longest is not None and capacity > longest:
            raise ValueError(
                f"beyond {longest} positions this model rotates old tokens anew, and {capacity} are asked for: give "
                "shorter prompts or fewer new tokens"
            )
        self.cache = self.trunk.cache(capacity)
        self.taps: frozenset[int] = frozenset()

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @property
    def depth(self) -> int:
        return self.trunk.depth

    @property
    def length(self) -> int:
        """Committed tokens; the pending token is not among them."""
        return self.cache.length

    def tap(self, taps: Iterable[int]) -> None:
        """Hidden states that every pass shall give from now on (negative: from the end; L is the normed output)."""
        self.taps = frozenset(tap % (self.depth + 1) for tap in taps)

    def companion(self, path: Path) -> Target:
        """Another model, from a directory, as a draft model beside this one: same device, dtype and vocabulary.

        Raises ValueError where the vocabularies differ.
        """
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=self.trunk.dtype, use_safetensors=True)
        other = Target(
            model.to(self.device).eval(),  # type: ignore[arg-type]
            capacity=self.cache.capacity,
        )
        if other.trunk.vocabulary != self.trunk.vocabulary:
            sizes = f"{other.trunk.vocabulary} against {self.trunk.vocabulary}"
            raise ValueError(
                f"{path} has another vocabulary than the target ({sizes}): name a draft model that shares it"
            )
        return other

    def reset(self) -> None:
        self.cache.reset()

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int]) -> Scores:
        """Start a sequence: commit the prompt and score what follows it."""
        self.reset()
        return self.extend(prompt)

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int] | Tensor) -> Scores:
        """Commit T known tokens and score what follows the last."""
        ids_T = torch.as_tensor(tokens, dtype=torch.long, device=self.device)
        hidden_TD, tapped = self._pass(self.trunk.embed(ids_T), self._after(ids_T.shape[0]))
        self.cache.commit(ids_T.shape[0])
        return Scores(self.trunk.head(hidden_TD[-1:]), tapped)

    @torch.inference_mode()
    def score(self, pending: int, draft: Draft) -> Scores:
        """One pass over the pending token and the drafted nodes; commits nothing."""
        root = torch.tensor([pending], device=self.device)
        ids_M = torch.cat((root, draft.tokens_N))
        positions_M = draft.shape.depth_M + self.length
        block = None if draft.shape.chain else draft.shape.ancestors_MM
        hidden_MD, tapped = self._pass(self.trunk.embed(ids_M), positions_M, block_MA=block)
        return Scores(self.trunk.head(hidden_MD), tapped)

    @torch.inference_mode()
    def keep(self, verdict: Verdict, draft: Draft) -> None:
        """Commit the pending token and the accepted path. A rejected branch leaves no trace."""
        if not draft.shape.chain:
            self.cache.gather(self.length + verdict.path_K, self.length + 1)
        self.cache.commit(1 + len(verdict.host().nodes))

    @torch.inference_mode()
    def peek(
        self,
        inputs: Sequence[int] | Tensor,
        *,
        at: int = 0,
        positions_M: Tensor | None = None,
        block_MA: Tensor | None = None,
        layers: Layers | None = None,
        adapters: LoRA | None = None,
    ) -> Tensor:
        """A pass in the scratch slots from `at` beyond the committed length: normed hidden states, (M, D).

        `inputs` are ids (M,) or embeddings (M, D); positions default to the slots'. Earlier scratch slots are seen
        (block_MA says which of them, default all), so a sequential drafter goes on without feeding anything twice.
        """
        if not isinstance(inputs, Tensor):
            inputs = torch.tensor(list(inputs), dtype=torch.long, device=self.device)
        hidden = inputs if inputs.is_floating_point() else self.trunk.embed(inputs)
        positions_M = self._after(hidden.shape[0], at) if positions_M is None else positions_M
        if adapters is None:
            return self._pass(hidden, positions_M, block_MA=block_MA, at=at, layers=layers, taps=())[0]
        with adapters.active():
            return self._pass(hidden, positions_M, block_MA=block_MA, at=at, layers=layers, taps=())[0]

    def _after(self, size: int, at: int = 0) -> Tensor:
        start = self.length + at
        return torch.arange(start, start + size, device=self.device)

    def _pass(
        self,
        hidden_MD: Tensor,
        positions_M: Tensor,
        *,
        block_MA: Tensor | None = None,
        at: int = 0,
        layers: Layers | None = None,
        taps: Iterable[int] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        view = CacheView(self.cache, self.length + at, positions_M, block_MA, self.trunk.windows)
        chosen = self.taps if taps is None else taps
        hidden_1MD, tapped = self.trunk.run(hidden_MD[None], positions_M, view, layers=layers, taps=chosen)
        return hidden_1MD[0], {tap: hidden[0] for tap, hidden in tapped.items()}

    @contextmanager
    def lent(self) -> Iterator[Any]:
        """transformers' own model, for its own forward, with its own attention and cache."""
        # No sdpa kernel caps attention scores; transformers' refuses to, or in older releases leaves the cap out.
        capped = getattr(self.trunk.config, "attn_logit_softcapping", None) is not None
        self.trunk._set_attention("eager" if capped else "sdpa")
        try:
            yield self.trunk.model
        finally:
            self.trunk._set_attention(INTERFACE)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int, end_ids: Iterable[int] = ()) -> list[int]:
        """New tokens of transformers' own greedy `generate`, which knows nothing of this target's cache."""
        from transformers import GenerationConfig

        ids_1T = torch.tensor([list(prompt)], device=self.device)
        ends = sorted(end_ids)
        with self.lent() as model:
            # What the model's makers advise (penalties, temperatures) is filled in for whatever is left unsaid.
            advised, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
            try:
                out_1T = model.generate(
                    ids_1T,
                    attention_mask=torch.ones_like(ids_1T),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=ends or None,
                    pad_token_id=ends[0] if ends else 0,
                )
            finally:
                model.generation_config = advised
        new_tokens: list[int] = out_1T[0, len(prompt) :].tolist()
        return new_tokens
