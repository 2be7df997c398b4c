"""How a round's forwards are launched: one kernel at a time, or as captured CUDA graphs, with layers compiled or not.

Whoever has device work with fixed shapes says `call(name, function, *inputs)`. The eager runtime calls the function; a
capturing one records it the first time and replays it afterwards, so methods and target know nothing of it. What makes
this safe is that every tensor that changes between rounds is either an input, which is copied to a fixed place, or
lies at a fixed address already: outputs of earlier captures, weights, the key-value cache, its length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from harness.cache import Compiled, KVCache, as_it_is

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
NAMES = ("eager", "graph", "compile")
Changed = Callable[[], Sequence[Tensor]]
"tensors that a function changes and reads, by which it would not do the same twice"
WARM_UPS = 2
"runs before a capture: libraries choose their algorithms and allocate workspaces, compiled code is made"


def unchanged() -> tuple[Tensor, ...]:
    return ()


class CaptureError(RuntimeError):
    """A capture failed, for its cause, and left the process in a state in which nothing more may be measured."""


class Runtime:
    """Eager: transformers' own kernels, one launch each."""

    name = "eager"
    joins = False
    "whether layers run in fewer kernels, over weights that are moved together (`harness.joined`)"

    def adopt(self, cache: KVCache, scratch: int) -> None:
        """A cache that calls will read and write; rounds reach `scratch` slots beyond its length."""

    def keeps(self, tensor: Tensor) -> bool:
        """Whether the tensor will be found at the same place in the next round."""
        return False

    def compiled(self, function: F) -> F:
        """A module's function of tensors, modules and constants, compiled where this runtime compiles."""
        return function

    def call(self, name: Hashable, function: Callable[..., R], *inputs: Tensor, changed: Changed = unchanged) -> R:
        """`function(*inputs)`. It may read the host only for what `name` and the inputs' shapes decide.

        To be captured it is run several times: it does the same each time, but for what is `changed`.
        """
        return function(*inputs)

    @property
    def captures(self) -> int:
        """Graphs captured so far."""
        return 0

    @property
    def capture_seconds(self) -> float:
        """What capturing them took, warm-up runs and compiling included."""
        return 0.0

    @property
    def captured_bytes(self) -> int:
        """What they keep allocated: their outputs and the places of their inputs."""
        return 0


class FixedRuntime(Runtime):
    """Fixed addresses without captures: what the capturing runtime does, one launch at a time. `compile` on a CPU."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.caches: list[KVCache] = []
        self._made: Compiled = compiled if name == "compile" else as_it_is

    def adopt(self, cache: KVCache, scratch: int) -> None:
        cache.fix(scratch, self._made)
        self.caches.append(cache)

    def compiled(self, function: F) -> F:
        return self._made(function)  # type: ignore[return-value]

    @property
    def captures(self) -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) if self.name == "compile" else 0


class Capture(Protocol):
    """Device work that was recorded once."""

    def replay(self, inputs: tuple[Tensor, ...]) -> Any:
        """Do it again on these inputs: the same outputs, with new values in them."""


class CapturingRuntime(FixedRuntime):
    """One capture a name, input shapes and cache spans; a subclass says how to record one."""

    joins = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._captured: dict[Hashable, Capture] = {}
        self._kept: set[int] = set()
        self._capturing = False

    def capture(self, function: Callable[..., Any], inputs: list[Tensor]) -> tuple[Capture, Any]:
        """Record `function(*inputs)`, whose inputs stay where they are: the capture and its outputs."""
        raise NotImplementedError

    def keeps(self, tensor: Tensor) -> bool:
        return id(tensor) in self._kept

    @property
    def captures(self) -> int:
        return len(self._captured)

    def call(self, name: Hashable, function: Callable[..., R], *inputs: Tensor, changed: Changed = unchanged) -> R:
        if self._capturing:
            return function(*inputs)  # part of a larger capture
        places = tuple(id(tensor) if self.keeps(tensor) else (tensor.shape, tensor.dtype) for tensor in inputs)
        key = (name, places, tuple(cache.span for cache in self.caches))
        if key not in self._captured:
            self._capturing = True
            fixed = [tensor if self.keeps(tensor) else tensor.clone() for tensor in inputs]
            before = [(tensor, tensor.clone()) for tensor in changed()]
            try:
                self._captured[key], outputs = self.capture(function, fixed)
            except Exception as error:
                raise CaptureError(str(error)) from error
            finally:
                self._capturing = False
            self._kept |= {id(tensor) for tensor in tensors_of(outputs)}
            for tensor, was in before:
                tensor.copy_(was)
        return self._captured[key].replay(inputs)  # type: ignore[no-any-return]


class GraphRuntime(CapturingRuntime):
    """CUDA graphs, all of one memory pool.

    A failed capture poisons the process, so a function that waits for the device must not come here. Graphs of one
    pool reuse each other's intermediate memory: outputs last until the round is over, and what a method remembers
    longer it copies to tensors of its own.
    """

    def __init__(self, name: str, device: torch.device, generator: torch.Generator | None) -> None:
        super().__init__(name)
        self.device, self.generator = device, generator
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = capture_stream(device)
        self._seconds, self._bytes = 0.0, 0

    @property
    def capture_seconds(self) -> float:
        return self._seconds

    @property
    def captured_bytes(self) -> int:
        return self._bytes

    def capture(self, function: Callable[..., Any], inputs: list[Tensor]) -> tuple[Capture, Any]:
        started, before = time.perf_counter(), torch.cuda.memory_allocated(self.device)
        random = None if self.generator is None else self.generator.get_state()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None and random is not None:
            self.generator.set_state(random)
            graph.register_generator_state(self.generator)
        cause: Exception | None = None
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                try:
                    outputs = function(*inputs)
                except Exception as error:
                    cause = error
                    raise
        except Exception:
            if cause is None:
                raise
            raise cause from cause.__cause__  # a broken capture cannot end either, and would say only that
        self._seconds += time.perf_counter() - started
        self._bytes += torch.cuda.memory_allocated(self.device) - before
        return Graph(graph, inputs, outputs), outputs


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures of a process: cuBLAS keeps a workspace for every stream that it was used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Graph:
    """A CUDA graph, the places of its inputs, and its outputs, which live as long as it does."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[Tensor], outputs: Any) -> None:
        self.graph, self.inputs, self.outputs = graph, inputs, outputs

    def replay(self, inputs: tuple[Tensor, ...]) -> Any:
        for place, tensor in zip(self.inputs, inputs, strict=True):
            if place is not tensor:
                place.copy_(tensor)
        self.graph.replay()
        return self.outputs


@cache
def compiled(function: F) -> F:
    """One piece of code for each combination of shapes and of whatever else is not a tensor."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    return torch.compile(function, fullgraph=True, dynamic=False)  # type: ignore[return-value]


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in a value: a tensor, a container, or an object of this package."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors_of(part)]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return [] if not hasattr(value, "__dict__") else tensors_of(vars(value))


def unsupported(name: str, bits: str, device: str) -> str | None:
    """Why a model of these bits cannot run so on a device, or None."""
    if name == "graph" and not device.startswith("cuda"):
        return "CUDA graphs need a CUDA device; `--runtime compile` compiles the layers without them"
    if name != "eager" and bits.startswith("int8") and bits != "int8:t0":
        return (
            f"{bits} looks for outliers on the host in every layer, which no graph can hold; `--bits int8:t0` can run"
        )
    if name == "compile" and bits in ("int8:t0", "nf4"):
        return f"bitsandbytes' {bits} kernels do not compile; `--runtime graph` captures them as they are"
    return None


def make(name: str, device: torch.device, generator: torch.Generator | None = None) -> Runtime:
    """The runtime of this name. `compile` without CUDA compiles and does not capture."""
    if name == "eager":
        return Runtime()
    if device.type == "cuda":
        return GraphRuntime(name, device, generator)
    return FixedRuntime(name)
