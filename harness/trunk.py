"""The walk over transformers' own modules: any subset of sublayers, with taps, explicit positions and an explicit view.

Nothing of a model is re-implemented here but the order of its residual additions, which is checked against
transformers' own forward for every architecture in `ARCHITECTURES`; short forwards at fixed addresses may run
`harness.joined` instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.attention import INTERFACE, FixedView, View, attend_view
from harness.cache import KVCache
from harness.errors import UserError
from harness.joined import FORMS, JoinedLayer, fused_norm, turning
from harness.runtime import Runtime

PRE_NORM = ("input_layernorm", None, "post_attention_layernorm", None)
SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")

Norms = tuple[str, str | None, str, str | None]
Normalise = Callable[[nn.Module, Tensor], Tensor]
ARCHITECTURES: dict[str, Norms] = {
    "llama": PRE_NORM,
    "mistral": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    "phi3": PRE_NORM,
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
}
"""model_type -> names of the norms before and after attention, before and after the MLP."""


@dataclass(frozen=True)
class Layers:
    """Which sublayers a pass runs; a sublayer left out is the identity."""

    attention: frozenset[int]
    mlp: frozenset[int]

    @classmethod
    def of(cls, indices: Iterable[int]) -> Layers:
        both = frozenset(indices)
        return cls(both, both)

    @classmethod
    def ends(cls, front: int, back: int, total: int) -> Layers:
        """The first `front` and the last `back` of `total` layers. Raises UserError where there are no such."""
        if min(front, back) < 0 or not 1 <= front + back <= total:
            raise UserError(
                f"the target has {total} layers, so {front}+{back} of them cannot draft: keep at least 1 and at most "
                f"{total}, front and back together"
            )
        return cls.of((*range(front), *range(total - back, total)))

    def without(self, attention: Iterable[int], mlp: Iterable[int]) -> Layers:
        return Layers(self.attention - frozenset(attention), self.mlp - frozenset(mlp))

    @property
    def indices(self) -> list[int]:
        """Layers of which anything runs, in order."""
        return sorted(self.attention | self.mlp)


class Trunk:
    """A causal language model of transformers, opened up.

    Raises ValueError for a model it cannot walk, with the reason.
    """

    def __init__(self, model: Any) -> None:
        reason = unsupported(model.config)
        if reason is not None:
            raise ValueError(reason)
        from transformers import AttentionInterface

        AttentionInterface.register(INTERFACE, attend_view)
        self.model = model
        self.config = model.config
        if self.config.model_type == "llama" and getattr(self.config, "sliding_window", None) is not None:
            # Its layers mask none, but transformers' own cache would drop keys: the reference must be the layers' text.
            self.config.sliding_window = None
        self.body = model.model
        self.head_module: nn.Module = model.get_output_embeddings()
        self.layers: list[Any] = list(self.body.layers)
        self.depth = len(self.layers)
        self.devices: list[torch.device] = [next(layer.parameters()).device for layer in self.layers]
        "where each layer lives; inputs and outputs of the walk are on `device` wherever that is"
        self.width: int = self.config.hidden_size
        self.vocabulary: int = self.head_module.weight.shape[0]
        self.dtype: torch.dtype = self.body.norm.weight.dtype
        self.device: torch.device = self.body.embed_tokens.weight.device
        self._norms = ARCHITECTURES[self.config.model_type]
        self._layer_types: list[str] | None = getattr(self.config, "layer_types", None)
        # Gemma 3 rotates its sliding and its full layers by different bases.
        self._rotary_by_type = self.config.model_type == "gemma3_text"
        self._softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self.windows = _windows(self.config, self.depth)
        self.groups: int = self.config.num_attention_heads // self.config.num_key_value_heads
        "query heads that share a key"
        self.fixed: list[Any] = self.layers
        "what runs in their place at fixed addresses"
        self._run_fixed: Callable[..., Tensor] = run_layer
        self._normalise: Normalise = as_written
        self._set_attention(INTERFACE)

    def _set_attention(self, name: str) -> None:
        self.config._attn_implementation = name

    def cache(self, capacity: int, *, layers: Iterable[int] | None = None, batch: int = 1) -> KVCache:
        """An empty cache for `layers` (default: all)."""
        chosen = range(self.depth) if layers is None else layers
        return KVCache(
            {layer: self.devices[layer] for layer in chosen},
            capacity,
            heads=self.config.num_key_value_heads,
            width=getattr(self.config, "head_dim", None) or self.width // self.config.num_attention_heads,
            dtype=self.dtype,
            batch=batch,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """(.., M) ids -> (.., M, D), scaled as the architecture does."""
        return self.body.embed_tokens(ids)  # type: ignore[no-any-return]

    def run(
        self,
        hidden_BMD: Tensor,
        positions_M: Tensor,
        view: View,
        *,
        layers: Layers | None = None,
        taps: Iterable[int] = (),
        instead: Mapping[int, nn.Module] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the chosen sublayers and the final norm; `instead` has layers that stand in for the model's own.

        Returns the normed hidden state (B, M, D) and, for each tap i, the input of layer i (i = L: the normed output),
        numbered as transformers' `hidden_states`. positions_M may also be (B, M).
        """
        wanted, tapped = frozenset(taps), {}
        own, run = (self.fixed, self._run_fixed) if isinstance(view, FixedView) else (self.layers, run_layer)
        positions = positions_M if positions_M.dim() == 2 else positions_M[None]
        turns: dict[tuple[str | None, torch.device], Any] = {}
        embedded_BMD = hidden_BMD
        for index in range(self.depth) if layers is None else layers.indices:
            device = self.devices[index]
            layer = own[index] if instead is None else instead.get(index, own[index])
            if index in wanted:
                tapped[index] = hidden_BMD.to(self.device)
            hidden_BMD = hidden_BMD.to(device)
            kind = self._layer_types[index] if self._rotary_by_type and self._layer_types else None
            if (kind, device) not in turns:
                arguments = (embedded_BMD, positions) if kind is None else (embedded_BMD, positions, kind)
                turn = tuple(turn.to(device) for turn in self.body.rotary_emb(*arguments))
                turns[kind, device] = turn if own is self.layers else turning(*turn)
            attends = layers is None or index in layers.attention
            feeds = layers is None or index in layers.mlp
            how = (turns[kind, device], attends, feeds)
            place = view.slots(index, self.groups) if isinstance(view, FixedView) else view
            hidden_BMD = run(layer, self._norms, self._normalise, hidden_BMD, place, *how)
        hidden_BMD = self._normalise(self.body.norm, hidden_BMD.to(self.body.norm.weight.device)).to(self.device)
        if self.depth in wanted:
            tapped[self.depth] = hidden_BMD
        return hidden_BMD, tapped

    def fix(self, runtime: Runtime) -> None:
        """From now on short forwards at fixed addresses run as this runtime would have it, over the same weights.

        Layers of Llama's form are joined where kernels are launched, and every plain RMS norm is one kernel of torch's
        instead of eight, or part of a compiled product; it rounds once where transformers' rounds twice, which bfloat16
        shows in its last bit.
        """
        if runtime.joins and self.config.model_type in FORMS:
            assert self._norms == PRE_NORM
            self.fixed = [JoinedLayer(layer) for layer in self.layers]
        self._run_fixed = runtime.compiled(run_layer)
        self._normalise = fused_norm

    def head(self, normed: Tensor) -> Tensor:
        """Logits of normed hidden states, (.., V)."""
        weight: Tensor = self.head_module.weight  # type: ignore[assignment]
        return self.cap(self.head_module(normed.to(weight.device)).to(self.device))

    def cap(self, logits: Tensor) -> Tensor:
        """The architecture's soft cap on logits, if it has one."""
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def head_rows(self, ids: Tensor | None) -> Tensor:
        """Rows of the output head, (V', D): the head of a smaller draft vocabulary. The whole head is not copied."""
        weight: Tensor = self.head_module.weight  # type: ignore[assignment]
        return weight if ids is None else weight[ids.to(weight.device)].to(self.device)


def unsupported(config: Any) -> str | None:
    """Why a model with this configuration cannot be walked, or None."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        return f"architecture {kind!r} is not supported; these are: {', '.join(sorted(ARCHITECTURES))}"
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        return f"layers of type {', '.join(sorted(odd))} keep state that cannot be taken back after a rejected draft"
    if getattr(config, "use_bidirectional_attention", None):
        return "bidirectional attention cannot decode token by token"
    return None


def horizon(config: Any) -> int | None:
    """Positions within which a token is rotated alike in every pass, or None where it always is.

    Beyond them, long-context rotations (`longrope`, `dynamic`) depend on the longest position of the pass, so a draft
    would change what was already said.
    """
    each = _rotations(config)
    if not any(part.get("rope_type", "default") in ("longrope", "dynamic") for part in each):
        return None
    told: list[int | None] = [part.get("original_max_position_embeddings") for part in (*each, vars(config))]
    return min((original for original in told if original), default=int(config.max_position_embeddings))


def reads_positions(config: Any) -> bool:
    """Whether the rotation looks at its positions on the host, which no capture can hold."""
    return any(part.get("rope_type") == "dynamic" for part in _rotations(config))


def _rotations(config: Any) -> list[dict[str, Any]]:
    """Of all layers, or of each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _windows(config: Any, depth: int) -> dict[int, int] | None:
    """Sliding window of each layer that has one."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * depth
    return {i: window for i, kind in enumerate(types) if kind == "sliding_attention"} or None


def run_layer(
    layer: Any,
    norms: Norms,
    normalise: Normalise,
    hidden_BMD: Tensor,
    view: View,
    turn: tuple[Tensor, Tensor],
    attends: bool,
    feeds: bool,
) -> Tensor:
    """One decoder layer, with or without its attention and its MLP."""
    if isinstance(layer, JoinedLayer):
        return layer(hidden_BMD, turn, view, attends, feeds)  # type: ignore[no-any-return]
    before_attention, after_attention, before_mlp, after_mlp = norms
    if attends:
        normed = normalise(getattr(layer, before_attention), hidden_BMD)
        out, _ = layer.self_attn(normed, position_embeddings=turn, attention_mask=None, view=view)
        hidden_BMD = hidden_BMD + (out if after_attention is None else normalise(getattr(layer, after_attention), out))
    if feeds:
        out = layer.mlp(normalise(getattr(layer, before_mlp), hidden_BMD))
        hidden_BMD = hidden_BMD + (out if after_mlp is None else normalise(getattr(layer, after_mlp), out))
    return hidden_BMD


def as_written(norm: nn.Module, hidden: Tensor) -> Tensor:
    """A norm as transformers has it."""
    return norm(hidden)  # type: ignore[no-any-return]


class DraftHead:
    """The target's output head, whole or cut to the rows of a draft vocabulary, or a drafter's own.

    `ids_V` are the target ids of the rows (None: all). Only the target's whole head costs no drafter bytes.
    """

    def __init__(self, trunk: Trunk, ids_V: Tensor | None, own_VD: Tensor | None = None) -> None:
        """Raises ValueError for ids that the target does not have, and for an own head of another shape."""
        self.trunk = trunk
        self.ids_V = None if ids_V is None else ids_V.to(trunk.device, torch.long)
        known = ids_V is None or ids_V.is_meta or bool(((ids_V >= 0) & (ids_V < trunk.vocabulary)).all())
        if not known:
            raise ValueError(
                f"this drafter's vocabulary has ids outside the target's {trunk.vocabulary}: name a drafter that was "
                "trained for this target"
            )
        self.weight_VD = None if self.ids_V is None else trunk.head_rows(self.ids_V)
        if own_VD is not None:
            self.refuse_misfit(own_VD)
            self.weight_VD = own_VD.to(trunk.device, trunk.dtype)

    def refuse_misfit(self, own_VD: Tensor) -> None:
        """Raises ValueError for an output head that is not one row an id, as wide as the target."""
        rows, width = self.rows, self.trunk.width
        if own_VD.shape != (rows, width):
            raise ValueError(
                f"this drafter's output head is {' x '.join(map(str, own_VD.shape))}, where {rows} tokens x {width} "
                "features are needed: name a drafter that was trained for this target"
            )

    @property
    def rows(self) -> int:
        """Tokens that it tells apart."""
        return self.trunk.vocabulary if self.ids_V is None else self.ids_V.shape[0]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.weight_VD, self.ids_V) if tensor is not None)

    def logits(self, normed: Tensor) -> Tensor:
        """(.., D) -> (.., V')."""
        if self.weight_VD is None:
            return self.trunk.head(normed)
        return self.trunk.cap(torch.nn.functional.linear(normed, self.weight_VD))

    def tokens(self, rows: Tensor) -> Tensor:
        """Target ids of rows of the head."""
        return rows if self.ids_V is None else self.ids_V[rows]


def cut_model(trunk: Trunk, layers: int, intermediate: int) -> Any:
    """A model of the same architecture with few layers and narrower MLPs, sharing the embedding, rotation and head.

    Its layers are random (std 0.02, output projections smaller); its norm is a copy of the original's. Raises
    ValueError for more layers than the original has.
    """
    if layers > trunk.depth:
        raise ValueError(f"a draft model of {layers} layers is deeper than its target of {trunk.depth}: give fewer")
    config = copy.deepcopy(trunk.config)
    config.num_hidden_layers, config.intermediate_size = layers, intermediate
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(trunk.model)(config)
    body = model.model
    body.layers.to_empty(device=trunk.device)
    for name, parameter in body.layers.named_parameters():
        if parameter.dim() > 1:
            small = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if small else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            # Gemma's norms scale by 1 + weight, all others by weight.
            nn.init.constant_(parameter, 0.0 if config.model_type.startswith("gemma") else 1.0)
    body.norm = copy.deepcopy(trunk.body.norm)
    body.norm.__dict__.pop("forward", None)  # accelerate's, which would send it to where the original is
    body.embed_tokens, body.rotary_emb = trunk.body.embed_tokens, trunk.body.rotary_emb
    model.lm_head = trunk.head_module
    return model.eval()
