"""EAGLE: one decoder layer over the target's features drafts its own next feature and token, step by step.

EAGLE-3 (Li et al. 2025, arXiv 2503.01840): g = fc([h_low, h_mid, h_high]); a step reads [norm(e), norm(g)], where e
embeds the next token; its own un-normed output a is the next step's g. EAGLE-1 (2024, arXiv 2401.15077) checkpoints
load too: the feature is the post-norm hidden state, a step reads fc([e, f]), and the target's head follows without a
norm.
Tree: EAGLE-2 (2024, arXiv 2406.16858): of the k best children of k best leaves keep k, `depth` times, then the N best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import drafter as checkpoint
from harness.attention import CacheView, Slots, View, attend, bias, frequencies, rotary
from harness.cache import KVCache
from harness.draft import Draft, Drawn, best_of_few, chain, dynamic_tree, likeliest_columns, likeliest_nodes
from harness.joined import Joined, cut, turn_, turn_and_attend, turning
from harness.lesson import Distilled, Lesson
from harness.method import Method, Natural, Options, Positive
from harness.sampling import Sampler
from harness.target import Scores, Target
from harness.trunk import DraftHead, Trunk
from harness.verify import Accepted, Verdict


class EagleOptions(Options, frozen=True, kw_only=True):
    depth: Positive = 5
    "tokens of a chain, or depth of the tree"
    nodes: Natural = 0
    "size of the dynamic tree (EAGLE-2's 59); 0 drafts a chain"
    branch: Positive = 8
    "tree: children tried a leaf, and leaves kept a step"
    drafter: str | None = None
    "checkpoint: file, directory or hub id"


Turns = tuple[Tensor, Tensor]
"cosines and sines of positions, as `harness.joined.turning` gives them"


class Layer(nn.Module):
    """The drafting layer. `generation` 1 has no norm before attention and reads width D, 3 has two and reads 2 D."""

    def __init__(self, config: dict[str, Any], generation: int) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.groups: int = self.heads // self.kv_heads
        self.head_width = config.get("head_dim") or width // self.heads
        self.base, epsilon, bias = config["rope_theta"], config["rms_norm_eps"], config.get("attention_bias", False)
        reads = width if generation == 1 else 2 * width
        self.fc = nn.Linear((2 if generation == 1 else 3) * width, width, bias=config.get("fc_bias", False))
        self.q_proj = nn.Linear(reads, self.heads * self.head_width, bias=bias)
        self.k_proj = nn.Linear(reads, self.kv_heads * self.head_width, bias=bias)
        self.v_proj = nn.Linear(reads, self.kv_heads * self.head_width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_width, width, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(width, epsilon)
        self.joined: tuple[Joined, Joined] | None = None
        self.generation = generation
        self.normed_residual = config.get("norm_before_residual", False)  # speculators' name for a variant of EAGLE-3
        if generation == 3:
            self.hidden_norm, self.input_layernorm = nn.RMSNorm(width, epsilon), nn.RMSNorm(width, epsilon)
            self.norm = nn.RMSNorm(width, epsilon)

    def join(self, batched: bool) -> Layer:
        """One product for what reads the same input, from now on: for drafting. The layer must not move any more."""
        qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
        first, second = (Joined({name: getattr(self, name) for name in names}, batched) for names in (qkv, gate_up))
        self.joined = first, second
        return self

    def features(self, tapped: Tensor) -> Tensor:
        """The target's hidden states, concatenated -> what a step takes as g, (.., D)."""
        return tapped if self.generation == 1 else self.fc(tapped)

    def turns(self, positions_BM: Tensor) -> Turns:
        """Cosines and sines of positions, as a step takes them."""
        return rotations(positions_BM, *self.rotation)

    @property
    def rotation(self) -> tuple[Tensor, torch.dtype]:
        """What `rotations` takes beside positions."""
        weight = self.fc.weight
        return frequencies(self.head_width, self.base, weight.device), weight.dtype

    def forward(self, g_BMD: Tensor, e_BMD: Tensor, turns: Turns, view: View) -> Tensor:
        """One step at M positions: un-normed output features (B, M, D)."""
        if self.generation == 1:
            residual = read = self.fc(torch.cat((e_BMD, g_BMD), dim=-1))
        else:
            normed_BMD = self.hidden_norm(g_BMD)
            residual = normed_BMD if self.normed_residual else g_BMD
            read = torch.cat((self.input_layernorm(e_BMD), normed_BMD), dim=-1)
        residual = residual + self._attention(read, turns, view)
        x = self.post_attention_layernorm(residual)
        gate, up = (self.gate_proj(x), self.up_proj(x)) if self.joined is None else self.joined[1].each(x)
        return residual + self.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]

    def _attention(self, x: Tensor, turns: Turns, view: View) -> Tensor:
        heads, kv_heads, scale = self.heads, self.kv_heads, 1 / math.sqrt(self.head_width)
        if self.joined is None:
            rows = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
            heads_BHMd = cut(rows, self.head_width)
        else:
            heads_BHMd = self.joined[0].heads(x, self.head_width)
        if isinstance(view, Slots):
            return self.o_proj(turn_and_attend(heads_BHMd, kv_heads, *turns, view, scale))  # type: ignore[no-any-return]
        turn_(heads_BHMd[:, : heads + kv_heads], *turns)
        q, k, v = torch.split(heads_BHMd, [heads, kv_heads, kv_heads], dim=1)
        keys, values = view.store(0, k, v)
        causal = view.causal(0)
        mask = None if causal else view.mask(0, self.groups)
        out = attend(q, keys, values, mask=mask, causal=causal, scale=scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def read_out(self, a: Tensor) -> Tensor:
        """What goes into the output head."""
        return a if self.generation == 1 else self.norm(a)


def rotations(positions_BM: Tensor, frequencies_d: Tensor, dtype: torch.dtype) -> Turns:
    return turning(*rotary(positions_BM, frequencies_d, dtype))


def run_step(layer: Layer, g_BMD: Tensor, e_BMD: Tensor, turns: Turns, view: Slots) -> Tensor:
    """What a runtime may compile: one function for every drafting layer."""
    return layer(g_BMD, e_BMD, turns, view)  # type: ignore[no-any-return]


def best_children(logits_BV: Tensor, chance_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest rows of the head under each leaf, likeliest first, and the logarithms of their paths'
    chances, (B, count) each."""
    rows_BR, log_q_BR = likeliest_columns(logits_BV, count)
    return rows_BR, chance_B[:, None] + log_q_BR


def grow(
    ids_BR: Tensor, chance_BR: Tensor, a_BD: Tensor, bias_GBS: Tensor, slots_B: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The likeliest of all children become the leaves whose keys go to `slots_B`.

    Their places among the children, chances, ids, parents' features, and what they see of the slots: what their parents
    see, and themselves.
    """
    chance_B, child_B = best_of_few(chance_BR.flatten(), slots_B.shape[0])
    parent_B = child_B // ids_BR.shape[1]
    own_GB1 = slots_B[:, None].expand(bias_GBS.shape[0], -1, 1)
    bias_GBS = bias_GBS.index_select(1, parent_B).scatter(2, own_GB1, 0.0)
    return child_B, chance_B, ids_BR.flatten()[child_B], a_BD[parent_B], bias_GBS


def rerank(ids_C: Tensor, chance_C: Tensor, leaf_R: Tensor, nodes: int, branch: int) -> tuple[Tensor, Tensor]:
    """The `nodes` likeliest of all children tried, and their parents' scored positions.

    Child c grew on leaf c // branch, which is child leaf_R - 1, or the root where leaf_R is 0.
    """
    keep_N = likeliest_nodes(chance_C, nodes)
    return ids_C[keep_N], torch.searchsorted(keep_N, leaf_R[keep_N // branch])


@dataclass(frozen=True)
class Ahead:
    """What the steps of one draft have in common."""

    slots_S: Tensor
    both: Tensor
    "keys and values up to the last of these slots at least"
    cos: Tensor
    sin: Tensor
    "of the positions of each level"

    def turns(self, level: int) -> Turns:
        return self.cos[:, :, level : level + 1], self.sin[:, :, level : level + 1]

    def view(self, slots: slice, bias_QS: Tensor) -> Slots:
        return Slots(self.both, self.slots_S[slots], bias_QS)


class Eagle(Method):
    name = "eagle"
    summary = "a one-layer drafter over the target's features; chain or dynamic tree"
    source = "Li et al. 2024-2025, arXiv 2401.15077, 2406.16858, 2503.01840"
    Options = EagleOptions
    needs_drafter = True

    def __init__(
        self,
        target: Target,
        layer: Layer,
        head: DraftHead,
        taps: Sequence[int],
        options: EagleOptions,
        sampler: Sampler,
    ) -> None:
        self.target, self.layer, self.head, self.taps = target, layer, head, taps
        self.options, self.sampler = options, sampler
        self.cache = target.adopt(
            KVCache(
                {0: target.device},
                target.cache.capacity,
                heads=layer.kv_heads,
                width=layer.head_width,
                dtype=target.trunk.dtype,
            )
        )
        self.last_1D = torch.zeros(1, target.trunk.width, device=target.device, dtype=target.trunk.dtype)

    @classmethod
    def load(cls, target: Target, options: EagleOptions, drafter: Path | None, sampler: Sampler) -> Eagle:
        assert drafter is not None
        layer, head, taps = load_layer(drafter, target.trunk)
        if options.nodes and options.branch > head.rows:
            raise ValueError(f"this eagle drafter knows {head.rows} tokens: branch={options.branch} is out of range")
        layer = layer.to(target.device, target.trunk.dtype).join(target.runtime.joins)
        return cls(target, layer, head, taps, options, sampler)

    @property
    def reach(self) -> int:
        in_tree = self.options.branch * self.options.depth + self.options.nodes
        return 2 + self.options.depth + (in_tree if self.options.nodes else 0)

    @property
    def drafter_bytes(self) -> int:
        return sum(p.nbytes for p in self.layer.parameters()) + self.head.bytes + self.cache.bytes

    def start(self, tokens: Sequence[int], scores: Scores) -> None:
        self.cache.reset()
        ids_T = torch.tensor(tokens[1:], device=self.target.device)
        # Any length once: never at fixed addresses.
        positions_T = self.cache.positions(0, ids_T.shape[0])
        turns, view = self.layer.turns(positions_T[None]), CacheView(self.cache, 0, positions_T)
        embedded_TD = self.target.trunk.embed(ids_T)
        fed_1TD = self.layer(self._features(self._tapped(scores))[None], embedded_TD[None], turns, view)
        self.last_1D.copy_(fed_1TD[0, -1:])
        self.cache.commit(ids_T.shape[0])

    def observe(self, draft: Draft, scores: Scores, verdict: Verdict) -> None:
        """Replace what the drafter imagined by the target's true features of the accepted path."""
        decided = (verdict.path_K, verdict.tokens_K, verdict.count, verdict.bonus)
        self.target.call("refill", self._refill, *decided, *self._tapped(scores))

    def _refill(self, path_K: Tensor, tokens_K: Tensor, count: Tensor, bonus: Tensor, *tapped_MD: Tensor) -> None:
        zero = path_K.new_zeros(1)
        rows_R = torch.cat((zero, path_K))
        ids_R = torch.cat((tokens_K, zero)).index_copy(0, count.view(1), bonus.view(1))
        ahead = self._ahead(ids_R.shape[0], ids_R.shape[0])
        view = ahead.view(slice(None), self._see(ahead, ahead.slots_S).repeat(self.layer.groups, 1))
        # Rows beyond the count are padding: never committed.
        g_RD = self._features([hidden_MD[rows_R] for hidden_MD in tapped_MD])
        fed_RD = self._step(g_RD, ids_R, (ahead.cos, ahead.sin), view)
        self.last_1D.copy_(fed_RD.index_select(0, count.view(1)))

    def settle(self, draft: Draft, accepted: Accepted) -> None:
        self.cache.commit(1 + len(accepted.nodes))

    def _tapped(self, scores: Scores) -> list[Tensor]:
        return [scores.hidden[tap % (self.target.depth + 1)] for tap in self.taps]

    def _features(self, tapped_RD: Sequence[Tensor]) -> Tensor:
        return self.layer.features(torch.cat(list(tapped_RD), dim=-1))

    def _step(self, g_MD: Tensor, ids_M: Tensor, turns: Turns, view: Slots) -> Tensor:
        """Features after reading ids_M."""
        run, embedded_MD = self.target.runtime.compiled(run_step), self.target.trunk.embed(ids_M)
        return run(self.layer, g_MD[None], embedded_MD[None], turns, view)[0]

    def propose(self, tokens: Sequence[int]) -> Draft:
        return self.target.call("draft", self._tree if self.options.nodes else self._chain)

    def _chain(self) -> Draft:
        depth = self.options.depth
        ahead = self._ahead(depth - 1, depth - 1)
        bias_SK = self._see(ahead, ahead.slots_S)
        a_1D = self.last_1D
        ids: list[Tensor] = []
        qs: list[Tensor] = []
        for step in range(depth):
            if step:
                view = ahead.view(slice(step - 1, step), bias_SK[step - 1 : step].expand(self.layer.groups, -1))
                a_1D = self._step(a_1D, ids[-1], ahead.turns(step - 1), view)
            logits_1V = self.head.logits(self.layer.read_out(a_1D))
            if self.sampler.greedy:
                ids.append(self.head.tokens(logits_1V.argmax(-1)))
            else:
                qs.append(self.sampler.distribution(logits_1V))
                ids.append(self.head.tokens(self.sampler.draw(qs[-1])))
        shape = chain(depth, self.target.device)
        if self.sampler.greedy:
            return Draft(torch.cat(ids), shape)
        rows = torch.arange(depth, device=self.target.device)
        return Draft(torch.cat(ids), shape, Drawn.IID, torch.cat(qs), rows, self.head.ids_V)

    def _tree(self) -> Draft:
        """EAGLE-2's expand and rerank. A leaf sees the verified tokens, its ancestors and itself."""
        depth, branch, device = self.options.depth, self.options.branch, self.target.device
        compiled = self.target.runtime.compiled
        ahead = self._ahead(depth - 1, branch * (depth - 1))
        bias_GBS = self._see(ahead, self.cache.positions(-1, 1)).expand(self.layer.groups, 1, -1)
        a_BD, chance_B = self.last_1D, torch.zeros(1, device=device)
        ids: list[Tensor] = []
        chances: list[Tensor] = []
        leaves, tried = [torch.zeros(1, dtype=torch.long, device=device)], 0
        for level in range(depth):
            if level:
                place = slice((level - 1) * branch, level * branch)
                grown = compiled(grow)(ids[-1], chances[-1], a_BD, bias_GBS, ahead.slots_S[place])
                child_B, chance_B, ids_B, a_BD, bias_GBS = grown
                leaves.append(child_B + (tried + 1))
                tried += ids[-1].numel()
                a_BD = self._step(a_BD, ids_B, ahead.turns(level - 1), ahead.view(place, bias_GBS.flatten(0, 1)))
            logits_BV = self.head.logits(self.layer.read_out(a_BD))
            rows_BR, chance_BR = compiled(best_children)(logits_BV, chance_B, branch)
            ids.append(self.head.tokens(rows_BR))
            chances.append(chance_BR)
        ids_C, chance_C = (torch.cat([part.flatten() for part in parts]) for parts in (ids, chances))
        kept_N, parents_N = compiled(rerank)(ids_C, chance_C, torch.cat(leaves), self.options.nodes, branch)
        return Draft(kept_N, dynamic_tree(parents_N, depth, compiled))

    def _ahead(self, levels: int, slots: int) -> Ahead:
        """For so many levels of steps, whose keys go to so many slots beyond the verified ones."""
        slots_S = self.cache.positions(0, slots)
        turns = self.target.runtime.compiled(rotations)(slots_S[None, :levels], *self.layer.rotation)
        return Ahead(slots_S, self.cache.both[0][..., : self.cache.reaching(slots), :], *turns)

    def _see(self, ahead: Ahead, slots_M: Tensor) -> Tensor:
        """(M, S), to be added to the scores of queries that see all slots up to `slots_M`, their own."""
        see, span = self.target.runtime.compiled(bias), ahead.both.shape[-2]
        here, dtype = self.cache.here, self.cache.dtype
        return see(here, slots_M, slots_M, None, span=span, at=0, window=None, groups=1, dtype=dtype)

    @classmethod
    def trainee(
        cls, trunk: Trunk, options: EagleOptions, vocabulary_V: Tensor | None, seed_ids: Tensor
    ) -> EagleTrainee:
        return EagleTrainee(trunk, options, vocabulary_V)


def load_layer(path: Path, trunk: Trunk) -> tuple[Layer, DraftHead, tuple[int, ...]]:
    """Read an EAGLE-1, EAGLE-3 or speculators checkpoint: (layer, head, taps).

    Ours names its taps and the draft vocabulary's ids; EAGLE-3's own gives `d2t` (target id = row + d2t[row]) and an
    output head, and taps the inputs of layers 2, L // 2 and L - 3 by convention.
    """
    stored, _ = checkpoint.metadata(path)
    tensors = {name.replace("midlayer.", "layers.0."): t for name, t in checkpoint.tensors(path).items()}
    told = {k: v for k, v in _flat(stored).items() if v is not None}
    # The authors' own configurations leave rope_theta out where it is their code's default.
    config = draft_config(trunk) | ({"rope_theta": 10_000.0} if stored else {}) | told
    generation = 3 if "layers.0.hidden_norm.weight" in tensors else 1
    config["fc_bias"] = "fc.bias" in tensors
    config["attention_bias"] = "layers.0.self_attn.q_proj.bias" in tensors
    if "layers.0.self_attn.q_proj.weight" in tensors:
        config["head_dim"] = tensors["layers.0.self_attn.q_proj.weight"].shape[0] // config["num_attention_heads"]
    if config["hidden_size"] != trunk.width:
        raise ValueError(
            f"this eagle drafter has {config['hidden_size']} features and the target {trunk.width}: name one that was "
            "trained for it"
        )
    layer = Layer(config, generation)
    wanted = layer.state_dict()
    state = {_short(name): tensor for name, tensor in tensors.items() if _short(name) in wanted}
    wrong = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
    if wrong:
        raise ValueError(f"{path} is no EAGLE checkpoint for this model: look at its {', '.join(sorted(wrong))}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    known = {*wanted, "rotary_emb.inv_freq"}
    odd = [name for name in tensors if name.startswith(("layers.", "input_norm")) and _short(name) not in known]
    if odd or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(
            f"{path} is a variant of EAGLE that is not known here ({', '.join(odd) or 'scaled rotary positions'}): it "
            "would draft badly, so it is not loaded"
        )
    layer.load_state_dict(state)
    ids = tensors.get("vocabulary")
    if "d2t" in tensors:
        ids = torch.arange(tensors["d2t"].shape[0]) + tensors["d2t"]
    head = DraftHead(trunk, ids, tensors.get("lm_head.weight"))
    return layer, head, _taps(stored, trunk.depth, generation)


def _taps(stored: dict[str, Any], depth: int, generation: int) -> tuple[int, ...]:
    if generation == 1:
        return (depth,)
    aux = "eagle_aux_hidden_state_layer_ids"
    named = stored.get("taps") or stored.get(aux) or (stored.get("eagle_config") or {}).get(aux)
    if named is None:
        return default_taps(depth)
    # speculators name either the inputs of layers or the layers themselves; a first id of 1 means the latter.
    if len(named) != 3:
        raise ValueError(
            f"this EAGLE-3 checkpoint reads {len(named)} hidden states; one that reads three can be loaded"
        )
    shift = 1 if "taps" not in stored and named[0] == 1 else 0
    return tuple(tap + shift for tap in named)


def default_taps(depth: int) -> tuple[int, ...]:
    """EAGLE-3's own, which in fewer than four layers count past an end and on from the other."""
    return tuple(tap % (depth + 1) for tap in (2, depth // 2, depth - 3))


def _flat(stored: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration; speculators keep the layer's under a key, new transformers the base too."""
    stored = stored | stored.get("transformer_layer_config", {})
    return stored | {k: v for k, v in (stored.get("rope_parameters") or {}).items() if k == "rope_theta"}


def _short(name: str) -> str:
    for prefix in ("layers.0.self_attn.", "layers.0.mlp.", "layers.0."):
        name = name.removeprefix(prefix)
    return name


def draft_config(trunk: Trunk) -> dict[str, Any]:
    """A drafting layer of the target's own proportions."""
    config = trunk.config
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None),
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rms_norm_eps": config.rms_norm_eps,
    }


class EagleTrainee(Distilled):
    """EAGLE-3's training-time test: step 0 over the whole text, later ones at the anchors on its own output."""

    def __init__(self, trunk: Trunk, options: EagleOptions, vocabulary_V: Tensor | None) -> None:
        self.trunk, self.vocabulary_V, self.depths = trunk, vocabulary_V, options.depth
        self.taps = default_taps(trunk.depth)
        self.module = self.layer = Layer(draft_config(trunk), 3).to(trunk.device)
        self.head = DraftHead(trunk, vocabulary_V)

    def logits(self, lesson: Lesson) -> Tensor:
        layer, trunk = self.layer, self.trunk
        batch, length = lesson.ids_BT.shape
        anchors = lesson.anchors_BA.shape[1]
        g_BTD = layer.features(torch.cat([lesson.hidden[tap] for tap in self.taps], dim=-1))
        next_BT = torch.cat((lesson.ids_BT[:, 1:], lesson.ids_BT[:, -1:]), dim=1)
        positions_BT = torch.arange(length, device=trunk.device).expand(batch, -1)
        view = _Growing()
        a_BTD = layer(g_BTD, trunk.embed(next_BT), layer.turns(positions_BT), view)
        a_BAD = lesson.at(a_BTD, -1)  # x_s is read at position s - 1
        read = [layer.read_out(a_BAD)]
        before_BAT = torch.arange(length, device=trunk.device) < lesson.anchors_BA[:, :, None]
        own_BAA = torch.eye(anchors, dtype=torch.bool, device=trunk.device).expand(batch, -1, -1)
        for step in range(1, self.depths):
            view.mask_B1QS = torch.cat((before_BAT, *[own_BAA] * step), dim=2)[:, None]
            embedded = trunk.embed(lesson.at(lesson.ids_BT, step))
            a_BAD = layer(a_BAD, embedded, layer.turns(lesson.anchors_BA + (step - 1)), view)
            read.append(layer.read_out(a_BAD))
        return self.head.logits(torch.stack(read, dim=2))

    def config(self) -> dict[str, Any]:
        return {"taps": list(self.taps), **draft_config(self.trunk)}

    def tensors(self) -> dict[str, Tensor]:
        attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
        places = dict.fromkeys(attention, "midlayer.self_attn.") | dict.fromkeys(mlp, "midlayer.mlp.")
        places |= dict.fromkeys(("post_attention_layernorm", "hidden_norm", "input_layernorm"), "midlayer.")
        out = {} if self.vocabulary_V is None else {"vocabulary": self.vocabulary_V.int()}
        for name, tensor in self.module.state_dict().items():
            out[places.get(name.split(".")[0], "") + name] = tensor.bfloat16()
        return out


class _Growing(View):
    """Keys of the whole text first, then those of each step at the anchors; gradients flow through all of them."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.mask_B1QS: Tensor | None = None

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.append(keys)
        self.values.append(values)
        return torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)

    def causal(self, layer: int) -> bool:
        return len(self.keys) == 1

    def mask(self, layer: int, groups: int) -> Tensor | None:
        return None if self.mask_B1QS is None else self.mask_B1QS.repeat(1, 1, groups, 1)
