"""The target: the model whose output must not change, with its cache. A draft model is a second Target.

A round is `score` (one pass over the pending token and the draft), `verify` (elsewhere), `keep` (move the accepted
path) and `commit`. `peek` runs a cheap pass in the scratch slots and leaves nothing behind. Shape letters:
`harness.draft`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.adapters import LoRA
from harness.attention import INTERFACE, CacheView, FixedView, View, view_of
from harness.cache import KVCache
from harness.draft import Draft, Shape
from harness.runtime import Changed, Runtime, unchanged
from harness.trunk import Layers, Trunk, horizon, reads_positions
from harness.verify import Accepted, Verdict

R = TypeVar("R")
SLOTS = 16
"capacities are multiples of this: products over rows of another length fall back to kernels without wide loads"


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

    def __init__(self, model: Any, *, capacity: int, scratch: int = 0, runtime: Runtime | None = None) -> None:
        """Rounds reach `scratch` slots beyond the committed length.

        Raises ValueError for a model that cannot be walked or captured, or not this far.
        """
        self.runtime = runtime or Runtime()
        self.capacity, self.scratch = capacity, scratch
        self.trunk = Trunk(model)
        if self.runtime.joins and reads_positions(model.config):
            raise ValueError(
                f"--runtime {self.runtime.name} cannot capture this model, whose rotation (dynamic) looks at positions "
                "on the host: use --runtime eager"
            )
        if self.runtime.name != "eager":
            self.trunk.fix(self.runtime)
        longest = horizon(model.config)
        if longest is not None and capacity > longest:
            raise ValueError(
                f"beyond {longest} positions this model rotates old tokens anew, and {capacity} are asked for: give "
                "shorter prompts or fewer new tokens"
            )
        self.cache = self.adopt(self.trunk.cache(-(-capacity // SLOTS) * SLOTS))
        self.pending_1 = torch.zeros(1, dtype=torch.long, device=self.device)
        "the token that the next round starts from; it is not in the cache yet"
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
        """Hidden states that every pass shall give from now on (negative: from the end; L is the normed output).

        Raises ValueError for layers that the model does not have.
        """
        taps = tuple(taps)
        if beyond := [tap for tap in taps if tap > self.depth]:
            raise ValueError(
                f"this drafter reads hidden states after layer {max(beyond)}, and the target has {self.depth} layers: "
                "name one that was trained for it"
            )
        self.taps = frozenset(tap % (self.depth + 1) for tap in taps)

    def adopt(self, cache: KVCache) -> KVCache:
        """A drafter's cache that is read and written in this target's rounds."""
        self.runtime.adopt(cache, self.scratch)
        return cache

    def call(self, name: Hashable, function: Callable[..., R], *inputs: Tensor, changed: Changed = unchanged) -> R:
        """Device work of fixed shapes, as the runtime does it: see `harness.runtime`."""
        return self.runtime.call(name, function, *inputs, changed=changed)

    def about(self, shape: Shape, name: str, function: Callable[..., R], *inputs: Tensor) -> R:
        """`call` for work on drafts of one shape, where that shape comes again; otherwise simply done."""
        if shape.fixed or self.runtime.keeps(shape.parents_M):
            return self.call((name, id(shape)), function, *inputs)
        return function(*inputs)

    def begin(self, pending: int) -> None:
        """A round begins, after the token `pending`."""
        self.pending_1.fill_(pending)

    def companion(self, path: Path) -> Target:
        """Another model, from a directory, as a draft model beside this one: same device, dtype and vocabulary.

        Raises ValueError where the vocabularies differ, and where weights are missing.
        """
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=self.trunk.dtype, use_safetensors=True, output_loading_info=True
        )
        model, said = loaded
        if said["missing_keys"]:
            raise ValueError(f"{path} lacks weights ({min(said['missing_keys'])}, say): name a complete draft model")
        other = self.beside(model.to(self.device).eval())
        if other.trunk.vocabulary != self.trunk.vocabulary:
            sizes = f"{other.trunk.vocabulary} against {self.trunk.vocabulary}"
            raise ValueError(
                f"{path} has another vocabulary than the target ({sizes}): name a draft model that shares it"
            )
        return other

    def beside(self, model: Any) -> Target:
        """A target of another model with as much room and the same runtime."""
        return Target(model, capacity=self.capacity, scratch=self.scratch, runtime=self.runtime)

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
        # Any length once: never at fixed addresses.
        positions_T = self.cache.positions(0, ids_T.shape[0])
        view = CacheView(self.cache, self.length, positions_T, None, self.trunk.windows)
        hidden_TD, tapped = self._run(self.trunk.embed(ids_T), positions_T, view, taps=self.taps)
        self.cache.commit(ids_T.shape[0])
        return Scores(self.trunk.head(hidden_TD[-1:]), tapped)

    @torch.inference_mode()
    def score(self, draft: Draft) -> Scores:
        """One pass over the pending token and the drafted nodes; commits nothing."""
        return self.about(draft.shape, "score", partial(self._score, draft.shape), draft.tokens_N)

    def _score(self, shape: Shape, tokens_N: Tensor) -> Scores:
        ids_M = torch.cat((self.pending_1, tokens_N))
        block = None if shape.chain else shape.ancestors_MM
        positions_M = shape.depth_M + self.cache.here
        view = view_of(self.cache, 0, positions_M, block, self.trunk.windows)
        hidden_MD, tapped = self._run(self.trunk.embed(ids_M), positions_M, view, taps=self.taps)
        return Scores(self.trunk.head(hidden_MD), tapped)

    @torch.inference_mode()
    def keep(self, verdict: Verdict, draft: Draft) -> None:
        """Move the accepted path to where it belongs; the cache's length follows in `commit`."""
        if not draft.shape.chain:
            overwritten = partial(self.cache.following, verdict.path_K.shape[0])
            self.call("keep", self.cache.gather, verdict.path_K, changed=overwritten)

    def commit(self, accepted: Accepted) -> None:
        """Commit the pending token and the accepted path. A rejected branch leaves no trace."""
        self.cache.commit(1 + len(accepted.nodes))

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
        positions_M = self.cache.positions(at, hidden.shape[0]) if positions_M is None else positions_M
        view = view_of(self.cache, at, positions_M, block_MA, self.trunk.windows)
        own = None if adapters is None else adapters.fixed if isinstance(view, FixedView) else adapters.layers
        return self._run(hidden, positions_M, view, layers=layers, instead=own)[0]

    def _run(self, hidden_MD: Tensor, positions_M: Tensor, view: View, **how: Any) -> tuple[Tensor, dict[int, Tensor]]:
        """The trunk on a batch of one."""
        hidden_1MD, tapped = self.trunk.run(hidden_MD[None], positions_M, view, **how)
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
    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, end_ids: Iterable[int] = (), cache: Any = None
    ) -> list[int]:
        """New tokens of transformers' own greedy `generate`, which knows nothing of this target's cache.

        `cache` is one of transformers' own, empty; None leaves it its default.
        """
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
                    **({} if cache is None else {cache_name(model): cache}),
                )
            finally:
                model.generation_config = advised
        new_tokens: list[int] = out_1T[0, len(prompt) :].tolist()
        return new_tokens


def cache_name(model: Any) -> str:
    """What transformers calls a model's cache: it was renamed."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
