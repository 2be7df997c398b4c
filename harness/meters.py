"""Stopwatch and gauges around one trial. The algorithm knows nothing of them: it yields after every round.

`verdict.host()` waits for the device in every round, so a stamp at each yield is honest without another
synchronisation; one at the end catches what the last round left in the queue.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import psutil
import torch

from harness import host
from harness.results import Memory

S = TypeVar("S")


@dataclass(frozen=True)
class Reading:
    """What one trial took. round_seconds has one entry a verify pass and sums to decode_seconds."""

    prefill_seconds: float
    decode_seconds: float
    round_seconds: list[float]
    memory: Memory
    energy_joules: float | None


class Gauges:
    """What a CPU can tell: the largest resident set."""

    def reset(self) -> None:
        """Peaks start here."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""

    def allocated_bytes(self) -> int | None:
        return None

    def energy_joules(self) -> float | None:
        """A counter that only grows."""
        return None

    def other_processes(self) -> int:
        """How many others compute on this device, as far as it tells."""
        return 0

    def memory(self) -> Memory:
        return Memory(peak_rss_bytes=peak_rss_bytes())


class AcceleratorGauges(Gauges):
    """An accelerator of `torch.accelerator` whose allocator keeps peaks; NVML where the driver has it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nvml = Nvml.find(device) if device.type == "cuda" else None
        self.keeps_peaks = device.type != "mps"

    def reset(self) -> None:
        self.synchronize()
        if self.keeps_peaks:
            torch.accelerator.memory.reset_peak_memory_stats(self.device)

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self.device)

    def allocated_bytes(self) -> int | None:
        return torch.accelerator.memory.memory_allocated(self.device) if self.keeps_peaks else None

    def energy_joules(self) -> float | None:
        return None if self.nvml is None else self.nvml.energy_joules()

    def other_processes(self) -> int:
        return 0 if self.nvml is None else self.nvml.other_processes()

    def memory(self) -> Memory:
        peaks = torch.accelerator.memory
        return Memory(
            peak_allocated_bytes=peaks.max_memory_allocated(self.device) if self.keeps_peaks else None,
            peak_reserved_bytes=peaks.max_memory_reserved(self.device) if self.keeps_peaks else None,
            process_bytes=None if self.nvml is None else self.nvml.process_bytes(),
            peak_rss_bytes=peak_rss_bytes(),
        )


def gauges(device: torch.device) -> Gauges:
    return Gauges() if device.type == "cpu" else AcceleratorGauges(device)


def measure(steps: Iterable[S], gauges: Gauges) -> tuple[list[S], Reading]:
    """Run `steps`, the first of which is the prefill, to their end."""
    taken: list[S] = []
    gauges.reset()
    energy_before = gauges.energy_joules()
    stamps = [perf_counter()]
    for step in steps:
        stamps.append(perf_counter())
        taken.append(step)
    gauges.synchronize()
    stamps[-1] = perf_counter()
    energy_after = gauges.energy_joules()
    reading = Reading(
        prefill_seconds=stamps[1] - stamps[0],
        decode_seconds=stamps[-1] - stamps[1],
        round_seconds=[after - before for before, after in pairwise(stamps[1:])],
        memory=gauges.memory(),
        energy_joules=None if energy_before is None or energy_after is None else energy_after - energy_before,
    )
    return taken, reading


class Nvml:
    """NVIDIA's management library for one GPU, found by UUID because its numbering ignores CUDA_VISIBLE_DEVICES."""

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle

    @classmethod
    def find(cls, device: torch.device) -> Nvml | None:
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid(device)))
        except pynvml.NVMLError:
            return None

    def process_bytes(self) -> int | None:
        """This process's memory, context included; None where the driver does not show it (other pid namespaces)."""
        return next((process.usedGpuMemory for process in self._running() if process.pid == os.getpid()), None)

    def other_processes(self) -> int:
        """Processes beside this one, which has a context there, so one is ours whatever its number elsewhere."""
        return max(0, len(self._running()) - 1)

    def _running(self) -> list[Any]:
        try:
            return list(self.library.nvmlDeviceGetComputeRunningProcesses(self.handle))
        except self.library.NVMLError:
            return []

    def energy_joules(self) -> float | None:
        try:
            return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except self.library.NVMLError:
            return None


def uuid(device: torch.device) -> str | None:
    """As NVML writes it; None for a device that has none."""
    if device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def peak_rss_bytes() -> int:
    """The largest resident set of this process, from /proc on Linux, where getrusage also counts the parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def device_name(device: torch.device) -> str:
    match device.type:
        case "cuda":
            return torch.cuda.get_device_name(device)
        case "xpu":
            return torch.xpu.get_device_name(device)
        case "cpu":
            return host.cpu_name()
        case kind:
            return kind
