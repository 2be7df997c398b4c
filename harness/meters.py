"""Stopwatch and gauges around one trial. The algorithm knows nothing of them: it yields after every round.

`verdict.host()` waits for the device in every round, so a stamp at each yield is honest without another
synchronisation; one at the end catches what the last round left in the queue.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import psutil
import torch

from harness import host
from harness.decode import Clock, Phase
from harness.results import DeviceState, Memory

S = TypeVar("S")


@dataclass(frozen=True)
class Reading:
    """What one trial took. round_seconds has one entry a verify pass and sums to decode_seconds."""

    prefill_seconds: float
    decode_seconds: float
    round_seconds: list[float]
    memory: Memory
    energy_joules: float | None
    before: DeviceState | None
    after: DeviceState | None


class Gauges:
    """What a CPU can tell: the largest resident set."""

    def reset(self) -> None:
        """Peaks start here."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""

    def allocated_bytes(self) -> int | None:
        return None

    def rounding_bytes(self) -> int | None:
        """What the allocator's blocks are larger than what was asked for, as far as it tells."""
        return None

    def refuse_beyond(self, budget_bytes: int) -> None:
        """Raises MemoryError where the process has been larger; nothing can cap a CPU's resident set from within."""
        peak = peak_rss_bytes()
        if peak > budget_bytes:
            raise MemoryError(
                f"over the budget: {peak / 2**30:.3f} GiB were resident at the peak, {budget_bytes / 2**30:.3f} allowed"
            )

    def energy_joules(self) -> float | None:
        """A counter that only grows."""
        return None

    def state(self) -> DeviceState | None:
        """Clocks, temperature, power and what throttles, where the device tells."""
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

    def refuse_beyond(self, budget_bytes: int) -> None:
        """Nothing to do: `cap` has told the allocator."""

    def allocated_bytes(self) -> int | None:
        return torch.accelerator.memory.memory_allocated(self.device) if self.keeps_peaks else None

    def rounding_bytes(self) -> int | None:
        stats = torch.accelerator.memory.memory_stats(self.device) if self.keeps_peaks else {}
        allocated, asked = (stats.get(f"{name}_bytes.all.current") for name in ("allocated", "requested"))
        return None if allocated is None or asked is None else allocated - asked

    def energy_joules(self) -> float | None:
        return None if self.nvml is None else self.nvml.energy_joules()

    def state(self) -> DeviceState | None:
        return None if self.nvml is None else self.nvml.state()

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


def cap(device: torch.device, budget_bytes: int, *, everywhere: bool = False) -> None:
    """Let this process's allocator reserve no more, on one device or on each.

    A device's context, some 0.5 GiB, is not the allocator's.
    """
    if device.type == "cuda":
        one = torch.cuda.current_device() if device.index is None else device.index
        for index in range(torch.cuda.device_count()) if everywhere else (one,):
            total = torch.cuda.get_device_properties(index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total), index)


class ShardedGauges(AcceleratorGauges):
    """Several accelerators of one kind: a peak each, and no energy, temperature or process memory of them together."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__(devices[0])
        self.devices, self.nvml = devices, None

    def reset(self) -> None:
        self.synchronize()
        for device in self.devices:
            torch.accelerator.memory.reset_peak_memory_stats(device)

    def synchronize(self) -> None:
        for device in self.devices:
            torch.accelerator.synchronize(device)

    def allocated_bytes(self) -> int | None:
        return sum(torch.accelerator.memory.memory_allocated(device) for device in self.devices)

    def rounding_bytes(self) -> int | None:
        return None

    def memory(self) -> Memory:
        peaks = {str(device): torch.accelerator.memory.max_memory_allocated(device) for device in self.devices}
        return Memory(peak_allocated_by_device=peaks, peak_rss_bytes=peak_rss_bytes())


def gauges(device: torch.device, layers: Sequence[torch.device] = ()) -> Gauges:
    """For a target whose inputs are on `device` and whose layers are on these."""
    devices = list(dict.fromkeys((device, *layers)))
    if len(devices) > 1:
        return ShardedGauges(devices)
    return Gauges() if device.type == "cpu" else AcceleratorGauges(device)


class WallClock(Clock):
    """Phases by the host's clock, for a device that the host does not run ahead of."""

    def __init__(self) -> None:
        self._marks: list[tuple[Phase | None, float]] = []

    def mark(self, phase: Phase | None) -> None:
        self._marks.append((phase, perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Total of each phase."""
        total: dict[str, float] = {}
        for (_, before), (phase, after) in pairwise(self._marks):
            if phase is not None:
                total[phase] = total.get(phase, 0.0) + after - before
        return total


class StreamClock(WallClock):
    """Phases by events on the device's stream: when the work was done, not when it was asked for."""

    def __init__(self) -> None:
        self._events: list[tuple[Phase | None, torch.cuda.Event]] = []

    def mark(self, phase: Phase | None) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((phase, event))

    def seconds(self) -> dict[str, float]:
        torch.cuda.synchronize()
        total: dict[str, float] = {}
        for (_, before), (phase, after) in pairwise(self._events):
            if phase is not None:
                total[phase] = total.get(phase, 0.0) + before.elapsed_time(after) / 1000
        return total


def clock(device: torch.device) -> WallClock:
    """A clock for one trial on the device."""
    return StreamClock() if device.type == "cuda" else WallClock()


def measure(steps: Iterable[S], gauges: Gauges) -> tuple[list[S], Reading]:
    """Run `steps`, the first of which is the prefill, to their end."""
    taken: list[S] = []
    before = gauges.state()
    gauges.reset()
    energy_before = gauges.energy_joules()
    stamps = [perf_counter()]
    for step in steps:
        if not taken:
            gauges.synchronize()  # a drafter's reading of the prompt is no part of the first round
        stamps.append(perf_counter())
        taken.append(step)
    gauges.synchronize()
    stamps[-1] = perf_counter()
    energy_after, after = gauges.energy_joules(), gauges.state()
    reading = Reading(
        prefill_seconds=stamps[1] - stamps[0],
        decode_seconds=stamps[-1] - stamps[1],
        round_seconds=[after - before for before, after in pairwise(stamps[1:])],
        memory=gauges.memory(),
        energy_joules=None if energy_before is None or energy_after is None else energy_after - energy_before,
        before=before,
        after=after,
    )
    return taken, reading


THROTTLES = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
}
"""NVML's bits for clocks lowered against the user's will; idling and clocks that the user set are none of them."""


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
        except pynvml.NVMLError:
            return None
        for name in nvml_names(device):
            with suppress(pynvml.NVMLError):
                return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(name))
        return None

    def _asked(self, question: str, *arguments: Any) -> Any:
        return host.nvml_answer(self.library, question, self.handle, *arguments)

    def state(self) -> DeviceState:
        core, memory = (
            self._asked("nvmlDeviceGetClockInfo", kind)
            for kind in (self.library.NVML_CLOCK_SM, self.library.NVML_CLOCK_MEM)
        )
        power = self._asked("nvmlDeviceGetPowerUsage")
        reasons = self._asked("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # the name before driver 535
            reasons = self._asked("nvmlDeviceGetCurrentClocksThrottleReasons")
        return DeviceState(
            core_clock_hz=None if core is None else core * 10**6,
            memory_clock_hz=None if memory is None else memory * 10**6,
            temperature_celsius=self._asked("nvmlDeviceGetTemperature", self.library.NVML_TEMPERATURE_GPU),
            power_watts=None if power is None else power / 1000,
            throttle_reasons=None if reasons is None else [name for bit, name in THROTTLES.items() if reasons & bit],
        )

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
        millijoules = self._asked("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else float(millijoules) / 1000


def uuid(device: torch.device) -> str | None:
    """As NVML writes it, `GPU-..` or, for a part of one, `MIG-..`; None for a device that has none."""
    return nvml_names(device)[0] if device.type == "cuda" else None


def nvml_names(device: torch.device) -> list[str]:
    """Under what NVML may know a CUDA device, likeliest first.

    A MIG instance is visible only where CUDA_VISIBLE_DEVICES names it, and then that name is its UUID.
    """
    own = str(torch.cuda.get_device_properties(device).uuid)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    index = device.index or 0
    named = visible[index] if index < len(visible) else ""
    given = [named] if named.startswith("MIG-") else []
    return [*given, *(own if own.startswith(kind) else f"{kind}{own}" for kind in ("GPU-", "MIG-"))]


@cache
def program_bytes() -> int:
    """The resident set of this process when it was first asked, which is before it loads anything."""
    return int(psutil.Process().memory_info().rss)


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


def forget_peak_rss() -> None:
    """From now on the peak is of what is resident now or later, where the system can (Linux with glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


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
