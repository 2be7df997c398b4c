"""Layers in fewer kernels: the same values, over the same memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from bench import Rehearsal, shake, text
from tiny import VOCAB, tiny
from torch import nn

from harness.adapters import LoRA
from harness.draft import Draft, chain
from harness.joined import FORMS, Joined, adjacent, apart, turn_, turning
from harness.target import Target
from harness.trunk import Trunk


def storages(model: nn.Module) -> int:
    """Bytes that a model's parameters keep alive."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(found.values())


@pytest.mark.parametrize(
    ("form", "config"),
    [*((form, {}) for form in sorted(FORMS)), ("llama", {"attention_bias": True, "mlp_bias": True})],
)
def test_joined_layers_score_as_transformers_own(form: str, config: dict[str, Any]) -> None:
    model = tiny(form, **config)
    shake(model, std=0.05)
    prompt, drafted = text(12, VOCAB), torch.tensor(text(5, VOCAB, seed=1))
    before, logits, layers = storages(model), [], []
    for runtime in (None, Rehearsal()):
        target = Target(model, capacity=64, scratch=16, runtime=runtime)
        target.prefill(prompt)
        target.begin(7)
        logits.append(target.score(Draft(drafted, chain(5, target.device))).logits_MV.clone())
        layers.append(target.trunk.fixed[0])
    assert not isinstance(layers[0].self_attn, type(layers[1].self_attn))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    assert storages(model) == before


def test_other_forms_keep_their_own_layers() -> None:
    for form in ("phi3", "gemma2"):
        target = Target(tiny(form), capacity=64, scratch=16, runtime=Rehearsal())
        assert target.trunk.fixed is target.trunk.layers


@pytest.mark.parametrize("form", ["llama", "qwen2", "gemma2"])
def test_adapters_are_the_same_at_fixed_addresses(form: str) -> None:
    model = tiny(form)
    hidden = []
    for runtime in (None, Rehearsal()):
        target = Target(model, capacity=64, scratch=16, runtime=runtime)
        torch.manual_seed(0)
        lora = LoRA(target.trunk, (0, 3), rank=4)
        shake(lora)
        held = sum(p.nbytes for p in lora.parameters())
        lora.join(target.trunk)
        assert sum(p.nbytes for p in lora.parameters()) == held
        target.prefill(text(12, VOCAB))
        with torch.inference_mode():
            hidden.append(target.peek(torch.tensor(text(4, VOCAB, seed=1)), adapters=lora))
            plain = target.peek(torch.tensor(text(4, VOCAB, seed=1)))
    torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(hidden[1], plain, rtol=1e-2)


def test_tensors_are_moved_together_once() -> None:
    parts = [torch.randn(3, 4), torch.randn(1, 4), torch.randn(2, 4)]
    values = torch.cat(parts)
    whole = adjacent(parts)
    assert torch.equal(whole, values)
    assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)
    again = adjacent(parts)
    assert again.data_ptr() == whole.data_ptr()
    assert torch.equal(again, values)
    some = adjacent(parts[:2])
    assert some.untyped_storage().nbytes() == some.nbytes, "what lay behind them is not kept"
    assert torch.equal(some, values[:4])
    assert torch.equal(parts[2], values[4:])


def test_tensors_of_one_storage_in_another_order_are_moved() -> None:
    whole = torch.arange(12.0).view(6, 2)
    swapped = adjacent([whole[3:], whole[:3]])
    assert swapped.tolist() == [*whole[3:].tolist(), *whole[:3].tolist()]


@pytest.mark.parametrize("bits", ["int8:t0", "nf4"])
def test_quantised_projections_join_without_another_number(bits: str) -> None:
    from harness.shapes import _quantised
    from harness.weights import Bits

    torch.manual_seed(0)
    plain = [nn.Linear(64, out, bias=True, dtype=torch.float32) for out in (64, 32, 32)]
    parts = {f"part{i}": _quantised(linear, Bits.parse(bits), torch.float32) for i, linear in enumerate(plain)}
    x = torch.randn(2, 3, 64)
    with torch.inference_mode():
        apart = torch.cat([part(x) for part in parts.values()], dim=-1)
        joined = Joined(parts)
        assert torch.equal(joined(x), apart)
        assert torch.equal(torch.cat([part(x) for part in parts.values()], dim=-1), apart)
        assert torch.equal(Joined(parts)(x), apart)
    assert len(joined.products) == (1 if bits == "int8:t0" else 3)


def test_rotation_in_place_is_transformers_own() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    cos, sin = Trunk(tiny("llama", head_dim=8)).body.rotary_emb(query, torch.arange(5)[None])
    expected = torch.cat(apply_rotary_pos_emb(query, key, cos, sin), dim=1)
    heads = torch.cat((query, key), dim=1)
    turn_(heads, *turning(cos, sin))
    torch.testing.assert_close(heads, expected)


def test_a_lent_model_keeps_nothing_of_the_adapters_before() -> None:
    model = tiny("gemma2")
    before = storages(model)
    target = Target(model, capacity=64, scratch=16, runtime=Rehearsal())
    lora = LoRA(target.trunk, (0, 3), rank=4)
    lora.join(target.trunk)
    assert storages(model) > before
    apart(model)
    assert storages(model) == before


def test_a_target_and_its_cache_go_with_their_last_name() -> None:
    """A cycle would keep them until Python collects, and a peak of the next cell would hold both."""
    gone = []
    for name in ("graph", "compile"):
        target = Target(tiny("llama"), capacity=64, scratch=16, runtime=Rehearsal(name))
        weakref.finalize(target.cache, gone.append, name)
        del target
    assert gone == ["graph", "compile"]
