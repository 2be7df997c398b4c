"""What a device can do at best, and the floor that this puts under a step: the roofline (Williams et al. 2009).

A pass over one sequence reads every weight once, so the time that those bytes take at the device's read bandwidth is
less than any step of plain decoding can take. Bandwidths are measured, once for each device, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import msgspec

from harness.paths import cache_dir, write_atomically
from harness.results import Roofline

if TYPE_CHECKING:
    import torch

    from harness.target import Target

S = TypeVar("S", bound=msgspec.Struct)

BUFFER_BYTES = {"cpu": 512 * 2**20}
ACCELERATOR_BUFFER_BYTES = 2 * 2**30
"far beyond any cache"
ROW = 4096
BUFFER_SHARE = 4
"no buffer takes more than one part in so many of the memory that is free"
MATRIX_SIDE = {"cpu": 1024}
ACCELERATOR_MATRIX_SIDE = 8192
WARM_UPS = 2
TOGETHER = 4
"runs between two looks at the clock, where launching one by one would show in the time"


# --- what is known ---------------------------------------------------------------------------------------------------


def identity(device: torch.device) -> list[str]:
    """What a device's figures belong to: the device itself, and what drives it."""
    import torch

    from harness import meters

    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return [meters.uuid(device) or "", meters.device_name(device), threads, str(torch.__version__)]


def path_of(*key: str) -> Path:
    """Where figures with this key are kept."""
    return cache_dir() / "roofline" / f"{hashlib.sha256(msgspec.json.encode(key)).hexdigest()[:24]}.json"


def read(path: Path, kind: type[S]) -> S | None:
    """What is kept there; None where there is nothing, or nothing that this version wrote."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def known(device: torch.device) -> Roofline | None:
    """The device's roofline, where it has been measured."""
    return read(path_of(*identity(device)), Roofline)


def keep(device: torch.device, found: Roofline) -> Roofline:
    write_atomically(path_of(*identity(device)), msgspec.json.encode(found))
    return found


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(device: torch.device, *, matrices: bool = False) -> Roofline:
    """Copy and read bandwidth, in about two seconds, and where wanted how fast matrices are multiplied."""
    import torch

    from harness import meters

    size = buffer_bytes(device)
    copy_seconds, read_seconds = bandwidth_seconds(device, size)
    flops = {name: matrix_flops(getattr(torch, name), device) for name in matrix_dtypes(device)} if matrices else {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Roofline(
        device_name=meters.device_name(device),
        device_uuid=meters.uuid(device),
        torch=str(torch.__version__),
        measured=now(),
        buffer_bytes=size,
        copy_bytes_per_second=2 * size / copy_seconds,
        read_bytes_per_second=size / read_seconds,
        matrix_flops=flops,
    )


def bandwidth_seconds(device: torch.device, size: int) -> tuple[float, float]:
    """Times to copy `size` bytes and to read them. What reads is the faster of a sum and a matrix-vector product."""
    import torch

    source, goal = (torch.ones(size // 4, device=device) for _ in range(2))  # ones: zeros need not lie anywhere
    total, rows = torch.empty((), device=device), source.view(-1, ROW)
    out, vector = torch.empty(rows.shape[0], device=device), torch.ones(ROW, device=device)
    together = 1 if device.type == "cpu" else TOGETHER
    copying, *reading = (
        median_seconds(work, device, together=together)
        for work in (
            lambda: goal.copy_(source),
            lambda: torch.sum(source, dim=0, out=total),
            lambda: torch.mv(rows, vector, out=out),
        )
    )
    return copying, min(reading)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def buffer_bytes(device: torch.device) -> int:
    import psutil
    import torch

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    wanted = BUFFER_BYTES.get(device.type, ACCELERATOR_BUFFER_BYTES)
    return min(wanted, free // BUFFER_SHARE) // 2**20 * 2**20


def matrix_dtypes(device: torch.device) -> list[str]:
    """float32, and bfloat16 where the device multiplies it in hardware."""
    from harness import weights

    return ["bfloat16"] * (weights.default_bits(device.type).width == 16) + ["float32"]


def matrix_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a square matrix product; float32 without TF32, as the harness decodes."""
    import torch

    side = MATRIX_SIDE.get(device.type, ACCELERATOR_MATRIX_SIDE)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    return 2 * side**3 / median_seconds(lambda: torch.mm(left, right, out=out), device)


def median_seconds(
    work: Callable[[], object],
    device: torch.device,
    *,
    together: int = 1,
    least: int = 5,
    most: int = 50,
    within_seconds: float = 0.5,
) -> float:
    """Median time of `work`, `together` runs at a time from an idle device on; first it is run without the clock."""
    for _ in range(WARM_UPS):
        work()
    samples: list[float] = []
    began = perf_counter()
    while len(samples) < least or (len(samples) < most and perf_counter() - began < within_seconds):
        samples.append(_seconds(work, device, together))
    return statistics.median(samples)


def _seconds(work: Callable[[], object], device: torch.device, together: int) -> float:
    """Mean of `together` runs, by the device's own clock where it has one."""
    import torch

    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        began.record()
        for _ in range(together):
            work()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000 / together
    _wait(device)
    start = perf_counter()
    for _ in range(together):
        work()
    _wait(device)
    return (perf_counter() - start) / together


def _wait(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# --- what a pass has to read -----------------------------------------------------------------------------------------


def weights_read(target: Target, weight_bytes: int) -> int:
    """Of the weights, what every pass reads: an input embedding counts only where it is the output head too."""
    embedding, head = target.trunk.body.embed_tokens.weight, target.trunk.head_module.weight
    tied = embedding.data_ptr() == head.data_ptr()  # type: ignore[operator]
    return weight_bytes if tied else weight_bytes - embedding.nbytes


def context_read(target: Target, length: int) -> int:
    """Keys and values that a pass reads after `length` tokens; a layer with a window reads no more than that."""
    trunk, cache = target.trunk, target.cache
    slot_bytes = cache.bytes // (cache.capacity * trunk.depth)
    windows = trunk.windows or {}
    return sum(slot_bytes * min(length, windows.get(layer, length)) for layer in range(trunk.depth))


def pass_bytes(target: Target, weight_bytes: int, length: int) -> int:
    """What a pass of plain decoding has to read after `length` tokens."""
    return weights_read(target, weight_bytes) + context_read(target, length)
