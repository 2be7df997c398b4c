"""What a target's forward costs on this device: by tokens scored, and by sequences in a batch. `doctor --bench`.

Scoring goes through `Target.score` and the chosen runtime, as in a round. Batches go through the same layers with one
token a sequence; a captured graph holds them, but no compiled layer does (those take one sequence).
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from harness import roofline
from harness.errors import UserError
from harness.paths import write_atomically
from harness.results import Roofline

if TYPE_CHECKING:
    from torch import Tensor

    from harness.cache import KVCache
    from harness.target import Target
    from harness.weights import LoadedModel

CONTEXT = 512
SCORE, BATCH = "tokens of one sequence", "sequences with a token each"
ORDER = (
    *((SCORE, 1), (SCORE, 8), (BATCH, 1), (BATCH, 8), (SCORE, 4), (SCORE, 16)),
    *((BATCH, 32), (SCORE, 32), (SCORE, 2), (BATCH, 4), (SCORE, 64)),
)
"what tells most is measured first: time may run out"
BUDGET_SECONDS = 30.0
"no point is begun later; the next call goes on"

SECONDS_A_POINT = 0.3
FIRST_ID = 3
"of the tokens that are scored: below are special ones"

Tell = Callable[[str], None]
Work = Callable[[], object]


class Forwards(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a target on a device."""

    model: str
    weights_sha256: str
    bits: str
    dtype: str
    runtime: str
    context: int
    "tokens in the cache of each sequence"
    weights_read: int
    "bytes of the weights that every forward reads"
    context_read: int
    "bytes of keys and values that it reads for each sequence"
    score_seconds: dict[int, float]
    "by tokens scored, of one sequence"
    batch_seconds: dict[int, float]
    "by sequences, one token each"
    left_out: tuple[str, ...] = ()
    "what could not be measured, and why"
    measured: str

    @property
    def times(self) -> dict[str, dict[int, float]]:
        """Seconds by kind and size."""
        return {SCORE: self.score_seconds, BATCH: self.batch_seconds}

    def floor_seconds(self, batch: int, found: Roofline) -> float:
        """Less than any forward over `batch` sequences can take."""
        return (self.weights_read + batch * self.context_read) / found.read_bytes_per_second


def bench(model: str | None, bits: str | None, runtime: str, *, fresh: bool, tell: Tell) -> tuple[Roofline, Forwards]:
    """Both, measured where they are not known yet, and kept. Raises UserError for what cannot run."""
    import torch

    from harness import host, weights
    from harness import runtime as runtimes
    from harness.worker import exact_float32

    device = torch.device(host.choose_device("auto"))
    source = weights.resolve(model)
    wanted = weights.default_bits(device.type) if bits is None else weights.Bits.parse(bits)
    if runtime not in runtimes.NAMES:
        raise UserError(f"no runtime {runtime!r}: there is {', '.join(runtimes.NAMES)}")
    if reason := runtimes.unsupported(runtime, wanted.id, device.type):
        raise UserError(reason)
    exact_float32()
    found = None if fresh else roofline.known(device)
    if found is None or not found.matrix_flops:
        tell("measuring the device")
        found = roofline.keep(device, roofline.measure(device, matrices=True))
    tell(f"loading {source.name}")
    loaded = weights.load(source, wanted, device=device.type)
    path = roofline.path_of(*roofline.identity(device), loaded.sha256, wanted.id, str(loaded.dtype), runtime)
    before = None if fresh else roofline.read(path, Forwards)
    measured = measure(loaded, runtime, before, tell)
    write_atomically(path, msgspec.json.encode(measured))
    return found, measured


def measure(loaded: LoadedModel, runtime: str, before: Forwards | None, tell: Tell) -> Forwards:
    """What was measured before, and what was not, as far as memory and time allow."""
    import torch

    from harness import runtime as runtimes
    from harness.target import Target
    from harness.worker import SPARE_SLOTS

    context = min(CONTEXT, longest(loaded.model.config) - SPARE_SLOTS)
    launching = runtimes.make(runtime, loaded.model.device)
    try:
        target = Target(loaded.model, capacity=context + SPARE_SLOTS, scratch=SPARE_SLOTS, runtime=launching)
    except ValueError as error:  # an architecture that cannot be walked
        raise UserError(str(error)) from error
    seconds: dict[str, dict[int, float]] = {SCORE: {}, BATCH: {}}
    if before is not None:
        seconds = {SCORE: dict(before.score_seconds), BATCH: dict(before.batch_seconds)}
    began, left_out = perf_counter(), []
    _fill(target.cache, context)
    target.begin(FIRST_ID)
    for kind, size in (point for point in ORDER if point[1] not in seconds[point[0]]):
        if perf_counter() - began > BUDGET_SECONDS:
            left_out.append(f"{size} {kind}: no time left")
            continue
        tell(f"measuring {size} {kind}")
        try:
            with torch.inference_mode():
                work = _scoring(target, size) if kind == SCORE else _batch(target, context, size)
                seconds[kind][size] = roofline.median_seconds(work, target.device, within_seconds=SECONDS_A_POINT)
                del work
        except torch.OutOfMemoryError:
            left_out.append(f"{size} {kind} and what comes after: out of memory")
            break  # a capture that failed leaves nothing to trust
    return Forwards(
        model=loaded.source.name,
        weights_sha256=loaded.sha256,
        bits=loaded.bits.id,
        dtype=str(loaded.dtype).removeprefix("torch."),
        runtime=runtime,
        context=context,
        weights_read=roofline.weights_read(target, loaded.weight_bytes),
        context_read=roofline.context_read(target, context),
        score_seconds=dict(sorted(seconds[SCORE].items())),
        batch_seconds=dict(sorted(seconds[BATCH].items())),
        left_out=tuple(left_out),
        measured=roofline.now(),
    )


def _scoring(target: Target, tokens: int) -> Work:
    """The pending token and a chain after it."""
    from harness.draft import point_chain

    draft = point_chain([FIRST_ID] * (tokens - 1), target.device)
    return lambda: target.score(draft)


def _batch(target: Target, context: int, size: int) -> Work:
    """One token of each of `size` sequences that have `context` tokens behind them."""
    import torch

    from harness.attention import CacheView

    trunk = target.trunk
    cache = trunk.cache(context + 1, batch=size)
    _fill(cache, context)
    positions_1 = cache.positions(0, 1)

    def forward(ids_B1: Tensor) -> Tensor:
        view = CacheView(cache, context, positions_1, None, trunk.windows)
        return trunk.head(trunk.run(trunk.embed(ids_B1), positions_1, view)[0])

    ids_B1 = torch.full((size, 1), FIRST_ID, device=target.device)
    return lambda: target.call(("batch", size), forward, ids_B1)


def _fill(cache: KVCache, length: int) -> None:
    """Random keys and values: what a text would have put there costs as much to read."""
    for part in (*cache.keys.values(), *cache.values.values()):
        part[:, :, :length].normal_()
    cache.commit(length)


def longest(config: Any) -> int:
    """Positions that this model can have."""
    from harness.trunk import horizon

    positions: int = config.max_position_embeddings
    return min(positions, horizon(config) or positions)
