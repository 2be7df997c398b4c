"""Runtimes: captures that are replayed, caches at fixed addresses, compiled layers. CUDA graphs need a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Rehearsal, decoded, load, steady, text, trainee, write
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCAB, tiny

from harness.cache import KVCache, bucket
from harness.decode import Limits
from harness.draft import Draft, tree
from harness.runtime import CaptureError, FixedRuntime, Runtime, make, unsupported
from harness.target import Target
from harness.verify import Verdict

CPU = torch.device("cpu")


@steady
@given(st.integers(1, 200_000), st.integers(0, 300))
def test_a_span_holds_what_is_asked_and_little_more(slots: int, more: int) -> None:
    assert slots <= bucket(slots) <= max(slots + 255, slots * 9 / 8)
    assert bucket(slots) <= bucket(slots + more)
    assert bucket(bucket(slots)) == bucket(slots)


def test_a_call_is_captured_once_a_name_shape_and_span() -> None:
    runtime, calls = Rehearsal(), []
    cache = KVCache({0: CPU}, 600, heads=1, width=2, dtype=torch.float32)
    runtime.adopt(cache, 64)

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return 2 * x

    first = runtime.call("double", double, torch.tensor([1.0, 2.0]))
    assert first.tolist() == [2.0, 4.0]
    assert runtime.keeps(first)
    again = runtime.call("double", double, torch.tensor([3.0, 4.0]))
    assert again is first
    assert again.tolist() == [6.0, 8.0]
    assert runtime.captures == 1
    runtime.call("double", double, torch.tensor([1.0]))
    runtime.call("other", double, torch.tensor([1.0, 2.0]))
    assert runtime.captures == 3
    cache.commit(300)  # another span
    runtime.call("double", double, torch.tensor([1.0, 2.0]))
    assert runtime.captures == 4


def test_what_a_call_changes_is_put_back_before_it_counts() -> None:
    runtime, sum_1 = Rehearsal(), torch.zeros(1)
    for step in (1.0, 2.0):
        runtime.call("add", lambda x: sum_1.add_(x), torch.tensor([step]), changed=lambda: [sum_1])
    assert sum_1.tolist() == [3.0]


def test_the_path_that_is_moved_first_arrives_whole() -> None:
    """In a round in which the move is captured, and so done several times."""
    moved = []
    for runtime in (Runtime(), Rehearsal()):
        target = Target(tiny("llama"), capacity=64, scratch=16, runtime=runtime)
        target.prefill(text(10, VOCAB))
        target.begin(7)
        draft = Draft(torch.tensor(text(5, VOCAB, seed=1)), tree((0, 0, 2, 3, 0), CPU))
        target.score(draft)
        target.keep(Verdict.of(torch.tensor([3, 9, 3, 2, 3, 4, 0, 0, 0]), torch.tensor(4)), draft)
        moved.append(target.cache.keys[0][:, :, :14].clone())
    torch.testing.assert_close(*moved)


def test_a_capture_that_failed_says_so() -> None:
    runtime = Rehearsal()
    with pytest.raises(CaptureError) as failed:
        runtime.call("bad", lambda x: 1 // 0, torch.tensor([1.0]))
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert runtime.captures == 0


def test_calls_within_a_capture_belong_to_it() -> None:
    runtime = Rehearsal()
    outer = runtime.call("outer", lambda x: runtime.call("inner", torch.neg, x) + 1, torch.tensor([2.0]))
    assert outer.tolist() == [-1.0]
    assert runtime.captures == 1


def test_an_output_of_one_capture_is_read_in_place_by_the_next() -> None:
    runtime = Rehearsal()
    for value in (1.0, 5.0):
        made = runtime.call("make", torch.neg, torch.tensor([value]))
        read = runtime.call("read", lambda x: x.sum(), made)
        assert float(read) == -value
    assert runtime.captures == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ar", {}),
        ("s3d", {}),
        ("s3d", {"nodes": 9, "tree": "dynamic"}),
        ("eagle", {}),
        ("eagle", {"nodes": 20}),
        ("layerskip", {}),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_compiled_layers_give_the_same_text(
    name: str, options: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    model = tiny(architecture)
    path = None
    if name in ("s3d", "eagle"):
        trained = {"k": 3, "rank": 4, "keep": "1+2"} if name == "s3d" else {}
        path = write(tmp_path / "drafter.safetensors", trainee(name, model, **trained))
    texts = []
    for runtime in (Runtime(), FixedRuntime("compile"), Rehearsal("compile")):
        target = Target(model, capacity=300, scratch=80, runtime=runtime)
        texts.append(decoded(target, load(name, target, path, **options), text(12, VOCAB), Limits(24)))
        assert bool(runtime.captures) is (runtime.name == "compile")
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("name", "bits", "device", "reason"),
    [
        ("graph", "16", "cpu", "need a CUDA device"),
        ("graph", "int8:t6", "cuda", "--bits int8:t0"),
        ("compile", "int8:t6", "cuda", "--bits int8:t0"),
        ("compile", "nf4", "cuda", "--runtime graph"),
        ("graph", "int8:t0", "cuda", None),
        ("compile", "32", "cpu", None),
        ("eager", "int8:t6", "cpu", None),
    ],
)
def test_what_cannot_be_captured_says_so(name: str, bits: str, device: str, reason: str | None) -> None:
    found = unsupported(name, bits, device)
    assert found is None if reason is None else reason in str(found)


def test_without_a_gpu_compile_does_not_capture() -> None:
    assert type(make("compile", CPU)) is FixedRuntime
    assert type(make("eager", CPU)) is Runtime
