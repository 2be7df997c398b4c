"""One token's product: the operation, the kernel in Triton's interpreter, and the layers that call it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from bench import Rehearsal, shake, text
from tiny import VOCAB, tiny
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from harness import joined
from harness.draft import nothing
from harness.joined import Joined, row_product
from harness.target import Target

INTERPRETED = """
import itertools, torch
from harness.joined import row_product
from harness.row_kernel import launch

torch.manual_seed(0)
sizes = (64, 6), (1024, 5), (2048, 3), (2560, 8)
tolerances = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
for (width, outs), scaled, adds, dtype in itertools.product(sizes, (0, 1), (0, 1), tolerances):
    x, weight, scale, plus = (torch.randn(*shape).to(dtype) for shape in ((width,), (outs, width), (width,), (outs,)))
    given = x, weight / width**0.5, scale if scaled else None, 1e-5, plus if adds else None
    close = dict(rtol=tolerances[dtype], atol=tolerances[dtype])
    torch.testing.assert_close(launch(*given), row_product(*given), **close)
"""


def test_the_kernel_gives_what_the_operation_says() -> None:
    """Interpreted, on a CPU: a process of its own, for Triton decides at its import."""
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=interpreted, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_the_operation_is_one_that_compilers_understand(scaled: bool, adds: bool) -> None:
    x, weight = torch.randn(8), torch.randn(6, 8)
    given = x, weight, torch.rand(8) if scaled else None, 1e-5, torch.randn(6) if adds else None
    torch.library.opcheck(row_product, given)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_give_a_token_alone_what_they_gave_it(small: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if compiled for CUDA: rows by themselves, but where a bias forbids it."""
    monkeypatch.setattr(joined, "SMALL_BYTES", 2**20 if small else 0)
    model, called = tiny("llama", attention_bias=bias), []
    shake(model, std=0.05)
    row = Joined._row
    monkeypatch.setattr(Joined, "_row", lambda self, *given: called.append(self.names) or row(self, *given))
    logits = []
    for by_row in (False, True):
        if by_row:
            monkeypatch.setattr(Joined, "_by_row", lambda self, x: x.numel() == x.shape[-1] and self._bare)
        target = Target(model, capacity=64, scratch=16, runtime=Rehearsal())
        target.prefill(text(12, VOCAB))
        target.begin(7)
        logits.append(target.score(nothing(target.device)).logits_MV.clone())
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    assert len(called) >= target.depth * (2 if bias else 4)
    assert bias is not any("self_attn.q_proj" in names for names in called)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_a_row_by_itself_is_that_row_of_a_product(small: bool, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "SMALL_BYTES", 2**20 if small else 0)
    torch.manual_seed(0)
    norm = LlamaRMSNorm(16) if normed else None  # type: ignore[no-untyped-call]
    parts = {name: nn.Linear(16, out, bias=False) for name, out in (("a", 6), ("b", 2))}
    layer, x, plus = Joined(parts, norm=norm), torch.randn(1, 1, 16), torch.randn(1, 1, 8)
    with torch.inference_mode():
        if norm is not None:
            norm.weight.uniform_()
        for added in (None, plus):
            row = layer._row(x.view(-1), None if added is None else added.view(-1))
            torch.testing.assert_close(row.view(1, 1, -1), layer(x, added))
