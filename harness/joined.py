"""Decoder layers of Llama's form in fewer kernels, for short forwards at fixed addresses.

Projections that read the same input are one product, and queries and keys are rotated together. The weights are the
model's own: joined ones lie one after another in memory, and the model's own layers look at their parts (plain ones
until `apart`). In float32 the values are transformers' to the last few bits; in half precision a rotation rounds once
less, and in one token's compiled product neither the norm nor what is added to rounds by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.attention import Slots, attend

FORMS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"model types whose attention and MLP are these: query, key and value projected and rotated apart; a gated MLP"
SMALL_BYTES = 8 * 2**20
"""of a weight whose product is all latency, 4 us at least by cuBLAS (H200): one token reads it by a kernel of the
compiler's own, and more tokens in blocks of it"""


class Joined(nn.Module):
    """Linear layers that read one input or its norm, (.., in) -> their outputs side by side, (.., out_1 + out_2 + ..).

    One product where the weights can lie together: plain and LLM.int8 ones can, nf4 has a state for each.
    """

    def __init__(self, parts: Mapping[str, Any], batched: bool = True, norm: nn.Module | None = None) -> None:
        """`parts` by their names in the decoder layer; `batched` where launches and latency are what costs.

        With a `norm` the inputs are normalised first.
        """
        super().__init__()
        self.names = tuple(parts)
        self.parts = list(parts.values())
        self.sizes = [part.out_features for part in self.parts]
        whole = _whole(self.parts)
        self.products = nn.ModuleList(self.parts if whole is None else [whole])
        self.plain, self.batched, self.norm = type(whole) is nn.Linear, batched, norm

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """The outputs, added to `plus`, (.., out), where it is given."""
        if self._by_row(x):
            return self._row(x.view(-1), None if plus is None else plus.view(-1)).view(*x.shape[:-1], -1)
        out = self.product(self.normed(x))
        return out if plus is None else plus + out

    def normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else fused_norm(self.norm, x)

    def product(self, normed: Tensor) -> Tensor:
        outs = [product(normed) for product in self.products]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def each(self, x: Tensor) -> Sequence[Tensor]:
        """(B, M, in) -> each layer's output, (B, M, out); all are of one size."""
        blocks = self._blocks(x, self.sizes[0])
        return torch.split(self(x), self.sizes, dim=-1) if blocks is None else blocks.unbind()

    def heads(self, x: Tensor, width: int) -> Tensor:
        """(B, M, in) -> (B, H, M, width), the outputs cut into heads."""
        blocks = self._blocks(x, width)
        return cut(self(x), width) if blocks is None else blocks.transpose(0, 1)

    def _by_row(self, x: Tensor) -> bool:
        """Whether this is one token and one plain matrix, compiled for CUDA."""
        return x.is_cuda and torch.compiler.is_compiling() and x.numel() == x.shape[-1] and self._bare

    def _row(self, x_D: Tensor, plus_O: Tensor | None) -> Tensor:
        """One token's outputs."""
        weight_OD: Tensor = self.products[0].weight  # type: ignore[assignment]
        if not self._small:
            norm: Any = self.norm
            scale_D, epsilon = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
            return torch.ops.harness.row_product(x_D, weight_OD, scale_D, epsilon, plus_O)  # type: ignore[no-any-return]
        out_O = (self.normed(x_D).float() * weight_OD).sum(-1).to(x_D.dtype)
        return out_O if plus_O is None else plus_O + out_O

    def _blocks(self, x: Tensor, size: int) -> Tensor | None:
        """Blocks of the outputs, (blocks, B, M, size), each contiguous; None where that costs more than it gives.

        Kernels over parts of rows take twice as long as over contiguous ones, and what is small is not slower as a
        batch of products.
        """
        if x.numel() == x.shape[-1] or not (self.batched and self._small):
            return None
        weight: Tensor = self.products[0].weight  # type: ignore[assignment]
        blocks = weight.view(-1, size, weight.shape[1]).transpose(1, 2)
        outs = torch.bmm(self.normed(x).flatten(0, -2).expand(len(blocks), -1, -1), blocks)
        return outs.view(len(blocks), *x.shape[:-1], size)

    @property
    def _bare(self) -> bool:
        """One plain matrix."""
        return self.plain and self.products[0].bias is None

    @property
    def _small(self) -> bool:
        product: Any = self.products[0]
        return self._bare and product.weight.nbytes <= SMALL_BYTES

    def widen(self, rows: Sequence[Tensor]) -> Tensor | None:
        """The weights with more rows behind them, which move there, as one tensor; None where that cannot be."""
        product: Any = self.products[0]
        if not self.plain or product.bias is not None or any(row.dtype != product.weight.dtype for row in rows):
            return None
        whole = adjacent([*(part.weight for part in self.parts), *rows])
        product.weight.data = whole[: sum(self.sizes)]
        return whole


class Attention(nn.Module):
    """Attention with one product for queries, keys and values, which are stored and rotated together.

    Hidden states in, and out with the attention's output added, (B, M, D).
    """

    def __init__(self, own: Any, norm: nn.Module) -> None:
        super().__init__()
        self.head_width, self.scaling = own.head_dim, own.scaling
        self.kv_heads = own.k_proj.out_features // own.head_dim
        self.heads = own.q_proj.out_features // own.head_dim
        parts = {f"self_attn.{name}": getattr(own, name) for name in ("q_proj", "k_proj", "v_proj")}
        self.qkv = Joined(parts, norm=norm)
        self.o_proj = Joined({"self_attn.o_proj": own.o_proj})
        self.q_norm, self.k_norm = getattr(own, "q_norm", None), getattr(own, "k_norm", None)

    def forward(self, hidden_BMD: Tensor, turn: tuple[Tensor, Tensor], view: Slots) -> Tensor:
        """`turn` is `turning`'s."""
        heads_BHMd = self.qkv.heads(hidden_BMD, self.head_width)
        if self.q_norm is not None and self.k_norm is not None:
            query, key, value = torch.split(heads_BHMd, [self.heads, self.kv_heads, self.kv_heads], dim=1)
            heads_BHMd = torch.cat((fused_norm(self.q_norm, query), fused_norm(self.k_norm, key), value), dim=1)
        attended_BMD = turn_and_attend(heads_BHMd, self.kv_heads, *turn, view, self.scaling)
        return self.o_proj(attended_BMD, hidden_BMD)  # type: ignore[no-any-return]


def turn_and_attend(heads_BHMd: Tensor, kv_heads: int, cos: Tensor, sin: Tensor, view: Slots, scale: float) -> Tensor:
    """Query, key and value heads, in this order, unrotated and overwritten -> what attention gives, (B, M, H * d).

    `cos` and `sin` are those of `turning`.
    """
    heads = heads_BHMd.shape[1] - 2 * kv_heads
    turn_(heads_BHMd[:, : heads + kv_heads], cos, sin)
    both_B2HMd = heads_BHMd[:, heads:].unflatten(1, (2, kv_heads))  # type: ignore[no-untyped-call]
    keys, values = view.store_both(both_B2HMd.transpose(0, 1))
    out = attend(heads_BHMd[:, :heads], keys, values, mask=view.bias_QS, scale=scale)
    return out.transpose(1, 2).flatten(2)


def cut(rows: Tensor, width: int) -> Tensor:
    """Rows of heads side by side, (B, M, H * width) -> (B, H, M, width)."""
    return rows.view(*rows.shape[:-1], -1, width).transpose(1, 2)


class MLP(nn.Module):
    """A gated MLP with one product for gate and up; hidden states in, and out with its output added."""

    def __init__(self, own: Any, norm: nn.Module) -> None:
        super().__init__()
        parts = {f"mlp.{name}": getattr(own, name) for name in ("gate_proj", "up_proj")}
        self.gate_up = Joined(parts, norm=norm)
        self.down_proj, self.act_fn = Joined({"mlp.down_proj": own.down_proj}), own.act_fn

    def forward(self, hidden_BMD: Tensor) -> Tensor:
        gate, up = self.gate_up.each(hidden_BMD)
        return self.down_proj(self.act_fn(gate) * up, hidden_BMD)  # type: ignore[no-any-return]


class JoinedLayer(nn.Module):
    """A decoder layer of one of FORMS, over the weights of transformers' own."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.self_attn = Attention(own.self_attn, own.input_layernorm)
        self.mlp = MLP(own.mlp, own.post_attention_layernorm)

    def forward(
        self, hidden_BMD: Tensor, turn: tuple[Tensor, Tensor], view: Slots, attends: bool, feeds: bool
    ) -> Tensor:
        if attends:
            hidden_BMD = self.self_attn(hidden_BMD, turn, view)
        return self.mlp(hidden_BMD) if feeds else hidden_BMD


@torch.library.custom_op("harness::row_product", mutates_args=())
def row_product(
    x_D: Tensor, weight_OD: Tensor, scale_D: Tensor | None, epsilon: float, plus_O: Tensor | None
) -> Tensor:
    """One token's outputs, (O,): of x or, with a scale, of its RMS norm (Zhang & Sennrich 2019); added to `plus`."""
    if scale_D is not None:
        x_D = F.rms_norm(x_D, x_D.shape, scale_D, epsilon)
    out_O = F.linear(x_D, weight_OD)
    return out_O if plus_O is None else plus_O + out_O


@row_product.register_fake
def _(x_D: Tensor, weight_OD: Tensor, scale_D: Tensor | None, epsilon: float, plus_O: Tensor | None) -> Tensor:
    return x_D.new_empty(weight_OD.shape[0])


@row_product.register_kernel("cuda")
def _(x_D: Tensor, weight_OD: Tensor, scale_D: Tensor | None, epsilon: float, plus_O: Tensor | None) -> Tensor:
    from harness.row_kernel import launch  # Triton comes with torch for CUDA

    return launch(x_D, weight_OD, scale_D, epsilon, plus_O)


def turning(cos_BMd: Tensor, sin_BMd: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines as `turn_` wants them: for every head, the sines of the first half negative."""
    half = sin_BMd.shape[-1] // 2
    return cos_BMd[:, None], torch.cat((-sin_BMd[..., :half], sin_BMd[..., half:]), dim=-1)[:, None]


def turn_(x_BHMd: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary positions (Su et al. 2021), half-split layout, in place."""
    first, second = x_BHMd.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    x_BHMd.mul_(cos).addcmul_(swapped, sin)


def fused_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """A plain RMS norm by torch's kernel; Gemma's, which scale by 1 + weight, as written."""
    epsilon: float | None = getattr(norm, "variance_epsilon", None)
    if epsilon is None:
        return norm(hidden)  # type: ignore[no-any-return]
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, epsilon)  # type: ignore[arg-type]


def twin(module: nn.Module, replaced: Mapping[str, nn.Module], prefix: str = "") -> nn.Module:
    """A module like this one over the same weights, with some of its descendants replaced."""
    made = copy.copy(module)
    made.__dict__.pop("forward", None)  # accelerate's, over several devices: it would call the module copied from
    children = {}
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        children[name] = replaced.get(path) or twin(child, replaced, f"{path}.")
    made.__dict__["_modules"] = children
    return made


def adjacent(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one after another along their first dimension, alone in their memory; moved where they do not lie so yet.

    Each of them is a view of its rows from then on. Their old memory is free, but for a file that is mapped.
    """
    memory = tensors[0].untyped_storage()
    places = [tensor.data_ptr() - memory.data_ptr() for tensor in tensors]
    ends = [place + tensor.nbytes for place, tensor in zip(places, tensors, strict=True)]
    rows = [tensor.shape[0] for tensor in tensors]
    if places == [0, *ends[:-1]] and ends[-1] == memory.nbytes() and all(each.is_contiguous() for each in tensors):
        return tensors[0].data.as_strided((sum(rows), *tensors[0].shape[1:]), tensors[0].stride())
    whole = torch.cat([tensor.data for tensor in tensors])
    for tensor, part in zip(tensors, torch.split(whole, rows), strict=True):
        tensor.data = part
    return whole


def apart(model: nn.Module) -> None:
    """Give every plain linear layer a memory of its own again, so that nothing stays that lay behind its weights."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.untyped_storage().nbytes() > module.weight.nbytes:
            module.weight.data = module.weight.data.clone()


def _whole(parts: Sequence[Any]) -> nn.Module | None:
    """One linear layer of the parts' weights, or None where their kind cannot lie together."""
    kinds, biased = {type(part) for part in parts}, {part.bias is not None for part in parts}
    if len(kinds) > 1 or len(biased) > 1:
        return None
    make = {"Linear": _plain, "Linear8bitLt": _int8}.get(kinds.pop().__name__)
    if make is None:
        return None
    whole: Any = make(parts)
    whole.bias = _frozen(adjacent([part.bias for part in parts])) if biased.pop() else None
    return whole.train(parts[0].training)  # type: ignore[no-any-return]


def _plain(parts: Sequence[nn.Linear]) -> nn.Linear:
    whole = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=False, device="meta")
    whole.weight = _frozen(adjacent([part.weight for part in parts]))
    return whole


def _int8(parts: Iterable[Any]) -> nn.Module:
    """Each output has a scale of its own, so the joined layer gives the same numbers."""
    import bitsandbytes as bnb

    parts = list(parts)
    for part in parts:
        if part.weight.CB is not None:
            part.init_8bit_state()  # as its first forward does
    codes = adjacent([part.weight for part in parts])
    scales = adjacent([part.state.SCB for part in parts])
    for part in parts:
        part.state.CB = part.weight.data
    kit: Any = bnb.nn
    outs = sum(part.out_features for part in parts)
    whole: Any = kit.Linear8bitLt(
        *(parts[0].in_features, outs, False),
        has_fp16_weights=False,
        threshold=parts[0].state.threshold,
        device="meta",
    )
    whole.weight = kit.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    return whole  # type: ignore[no-any-return]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
