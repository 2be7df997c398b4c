"""What tests of decoders share: random drafters, methods on tiny targets, decoded texts, lessons made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor

from harness import drafter, method
from harness.attention import CacheView
from harness.decode import Limits, Step, decode
from harness.draft import Draft
from harness.lesson import Lesson
from harness.method import Method
from harness.runtime import CapturingRuntime, tensors_of
from harness.sampling import Sampler
from harness.target import Scores, Target
from harness.trunk import DraftHead, Trunk
from harness.verify import Verdict

CAPACITY = 256
steady = settings(deadline=None, derandomize=True)
"property tests that neither a busy machine nor a lucky draw can turn red"


def text(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Random ids, 3 and up: below are the special tokens."""
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def sampler(temperature: float = 0.0, seed: int = 0, top_p: float = 1.0) -> Sampler:
    return Sampler(temperature, top_p, torch.Generator().manual_seed(seed))


def shake(module: torch.nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Move every parameter at random, to values that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            moved = parameter + std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(moved.bfloat16())


def trainee(
    name: str, model: Any, *, vocabulary_V: Tensor | None = None, seed: int = 0, std: float = 0.2, **given: Any
):  # type: ignore[no-untyped-def]
    """What `name` would train on this model, its parameters moved at random."""
    options = method.options_of(method.configure(name, given))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = method.find(name).trainee(Trunk(model), options, vocabulary_V, torch.arange(model.config.vocab_size))
    if made is not None and std:
        shake(made.module, seed, std)
    return made


def write(path: Path, made: Any) -> Path:
    drafter.write(path, made.tensors(), made.config(), {})
    return path


def load(name: str, target: Target, path: Path | None, draws: Sampler | None = None, **given: Any) -> Method:
    """The method as the harness would load it, with the taps it asks for."""
    options = method.options_of(method.configure(name, given))
    made = method.find(name).load(target, options, path, draws or sampler())
    target.tap(made.taps)
    return made


def decoded(
    target: Target, made: Method, prompt: Sequence[int], limits: Limits, draws: Sampler | None = None
) -> tuple[list[int], list[Step]]:
    """New tokens and rounds."""
    steps = list(decode(target, made, prompt, limits, draws or sampler()))
    return [token for step in steps for token in step.committed], steps


@torch.no_grad()
def lesson(
    trunk: Trunk, ids_BT: Tensor, anchors_BA: Tensor, taps: Iterable[int], vocabulary_V: Tensor | None = None
) -> Lesson:
    """A lesson as training makes it: one clean pass of the target over the text, judged at depth 0 only."""
    batch, length = ids_BT.shape
    cache = trunk.cache(length, batch=batch)
    positions_T = torch.arange(length)
    wanted = [tap % (trunk.depth + 1) for tap in taps]
    normed_BTD, hidden = trunk.run(
        trunk.embed(ids_BT), positions_T, CacheView(cache, 0, positions_T, None, trunk.windows), taps=wanted
    )
    cache.commit(length)
    rows_B1 = torch.arange(batch)[:, None]
    teacher_BAKV = DraftHead(trunk, vocabulary_V).logits(normed_BTD[rows_B1, anchors_BA])[:, :, None]
    choice_BAK = ids_BT[rows_B1, anchors_BA + 1][:, :, None]
    return Lesson(ids_BT, anchors_BA, hidden, cache, trunk, teacher_BAKV, choice_BAK)


def score(target: Target, pending: int, draft: Draft) -> Scores:
    """A round's scoring pass by itself."""
    target.begin(pending)
    return target.score(draft)


def keep(target: Target, verdict: Verdict, draft: Draft) -> None:
    """A round's end by itself."""
    target.keep(verdict, draft)
    target.commit(verdict.host())


class Rehearsal(CapturingRuntime):
    """Captures on a CPU: the first function of a name is kept and done again, with the host as it was then.

    So whatever is not an input and does not lie at a fixed address is stale, as it would be in a CUDA graph.
    """

    def __init__(self, name: str = "graph") -> None:
        super().__init__(name)

    def capture(self, function: Any, inputs: list[Tensor]) -> tuple[Any, Any]:
        outputs, lengths = function(*inputs), [cache.length for cache in self.caches]
        return Rehearsed(self, function, inputs, outputs, lengths), outputs


@dataclass
class Rehearsed:
    runtime: Rehearsal
    function: Any
    inputs: list[Tensor]
    outputs: Any
    lengths: list[int]

    def replay(self, inputs: tuple[Tensor, ...]) -> Any:
        for place, tensor in zip(self.inputs, inputs, strict=True):
            if place is not tensor:
                place.copy_(tensor)
        now = [cache.length for cache in self.runtime.caches]
        self._host(self.lengths, capturing=True)
        for place, tensor in zip(tensors_of(self.outputs), tensors_of(self.function(*self.inputs)), strict=True):
            place.copy_(tensor)
        self._host(now, capturing=False)
        return self.outputs

    def _host(self, lengths: Sequence[int], *, capturing: bool) -> None:
        self.runtime._capturing = capturing
        for cache, length in zip(self.runtime.caches, lengths, strict=True):
            cache.length = length


class Direct:
    """A target that does device work as it comes."""

    def about(self, shape: Any, name: str, function: Any, *inputs: Tensor) -> Any:
        return function(*inputs)
