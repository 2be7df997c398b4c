"""The walk over a model whose layers lie on several devices, as far as one device and the meta device can show it."""

from __future__ import annotations

import bench
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import VOCAB, tiny

from harness.adapters import LoRA
from harness.attention import CacheView
from harness.draft import chain, tree
from harness.joined import fused_norm
from harness.trunk import ARCHITECTURES, Trunk

META = torch.device("meta")


@pytest.mark.parametrize("branched", [False, True])
def test_hidden_states_rotations_masks_and_cache_follow_the_layers(branched: bool) -> None:
    """The second half of the layers, the norm and the head are elsewhere. Operations on two devices at once raise."""
    whole = Trunk(tiny("llama"))
    split = Trunk(tiny("llama"))
    for part in (*split.layers[2:], split.body.norm, split.head_module):
        part.to(META)
    split = Trunk(split.model)
    assert [device.type for device in split.devices] == ["cpu", "cpu", "meta", "meta"]
    split.device = META  # nothing can be brought back from there, so outputs stay
    ids_T = torch.tensor(bench.text(12, 128))
    shape = tree((0, 0, 1), ids_T.device) if branched else chain(3, ids_T.device)
    caches = [trunk.cache(64) for trunk in (whole, split)]
    for trunk, cache in zip((whole, split), caches, strict=True):
        for start, positions in ((0, torch.arange(8)), (8, 8 + shape.depth_M)):
            block = shape.ancestors_MM if start and branched else None
            view = CacheView(cache, start, positions, block)
            hidden, tapped = trunk.run(
                trunk.embed(ids_T[start : start + len(positions)])[None], positions, view, taps=[1, 2, 3]
            )
            cache.commit(8 if not start else 0)
        logits = trunk.head(hidden)
        assert logits.shape == (1, 4, 128)
        assert {each.device for each in (hidden, logits, *tapped.values())} == {trunk.device}
    for layer in (0, 1):
        torch.testing.assert_close(caches[1].keys[layer], caches[0].keys[layer], rtol=0, atol=0)
    assert [caches[1].keys[layer].device.type for layer in range(4)] == ["cpu", "cpu", "meta", "meta"]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_fused_norms_are_the_same_norms(architecture: str) -> None:
    ids_T = torch.tensor(bench.text(12, VOCAB))
    logits = []
    for fuses in (False, True):
        trunk = Trunk(tiny(architecture))
        norms = [norm for name, norm in trunk.body.named_modules() if "norm" in name.rpartition(".")[2]]
        assert len(norms) > 2 * trunk.depth
        for index, norm in enumerate(norms):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(index))
        if fuses:
            trunk.fix(bench.Rehearsal())
        positions = torch.arange(12)
        view = CacheView(trunk.cache(16), 0, positions)
        with torch.inference_mode():
            logits.append(trunk.head(trunk.run(trunk.embed(ids_T)[None], positions, view)[0]))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


def test_adapters_stay_active_where_accelerate_dispatched_the_model() -> None:
    """Its hooks are attributes of the modules, and a copied one would run what it was copied from."""
    ids_T = torch.tensor(bench.text(12, VOCAB))
    hidden = []
    for hooked in (False, True):
        model = tiny("llama")
        for module in model.modules() if hooked else ():
            add_hook_to_module(module, AlignDevicesHook("cpu"))
        trunk = Trunk(model)
        torch.manual_seed(0)
        lora = LoRA(trunk, range(4), rank=4)
        bench.shake(lora)
        positions = torch.arange(12)
        for instead in (None, lora.layers):
            view = CacheView(trunk.cache(16), 0, positions)
            with torch.inference_mode():
                hidden.append(trunk.run(trunk.embed(ids_T)[None], positions, view, instead=instead)[0])
    torch.testing.assert_close(hidden[3], hidden[1], rtol=0, atol=0)
    assert not torch.allclose(hidden[3], hidden[2])


def test_gemmas_norms_stay_as_written() -> None:
    hidden = torch.randn(1, 3, 8)
    for architecture, alike in (("llama", False), ("gemma2", True)):
        norm = tiny(architecture, hidden_size=8).model.norm
        calls = []
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        fused_norm(norm, hidden)
        assert bool(calls) is alike
