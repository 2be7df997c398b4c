"""Where the peak went, and what NVML is asked: with a library of our own in the place of the driver's."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from factory import cell, run, trial
from hypothesis import given
from hypothesis import strategies as st

from harness import host, meters
from harness.memory import attribute
from harness.metrics import summary
from harness.results import DeviceState, Memory
from reports.tables import memory as memory_table
from reports.tables import record, warnings

MIB = 2**20
ACCELERATOR = Memory(
    load_bytes=1010 * MIB,
    peak_allocated_bytes=1300 * MIB,
    peak_reserved_bytes=1400 * MIB,
    peak_rss_bytes=5000 * MIB,
    weights_bytes=800 * MIB,
    drafter_bytes=100 * MIB,
    cache_bytes=100 * MIB,
    graphs_bytes=50 * MIB,
)


def test_a_peak_is_the_sum_of_what_was_measured_apart() -> None:
    told = attribute(ACCELERATOR)
    assert told is not None
    assert {name: size // MIB for name, size in told.parts.items()} == {
        "weights": 800,
        "drafter": 100,
        "KV cache": 100,
        "graphs": 50,
        "activations, workspace": 240,
        "slack": 100,
    }
    assert told.unattributed_bytes == 10 * MIB
    assert told.adds_up


def test_what_blocks_are_larger_than_their_tensors_is_slack_within_the_peak() -> None:
    told = attribute(msgspec.structs.replace(ACCELERATOR, rounding_bytes=8 * MIB))
    assert told is not None
    assert told.unattributed_bytes == 2 * MIB
    assert told.parts["slack"] == 108 * MIB
    assert sum(told.parts.values()) + told.unattributed_bytes == ACCELERATOR.peak_reserved_bytes


@given(st.integers(-200, 200))
def test_tensors_that_nobody_counted_are_unattributed_and_two_percent_is_the_most(uncounted: int) -> None:
    told = attribute(msgspec.structs.replace(ACCELERATOR, weights_bytes=(800 - uncounted) * MIB))
    assert told is not None
    slackless = sum(size for name, size in told.parts.items() if name != "slack")
    assert slackless + told.unattributed_bytes == told.peak_bytes == 1300 * MIB
    assert told.adds_up == (abs(uncounted + 10) <= 26)


def test_on_a_cpu_the_program_is_a_part_and_the_rest_one() -> None:
    told = attribute(Memory(weights_bytes=30, drafter_bytes=5, cache_bytes=5, program_bytes=50, peak_rss_bytes=100))
    assert told is not None
    assert told.parts["program"] == 50
    assert told.parts["loading, activations, workspace"] == 10
    assert told.adds_up
    counted_twice = attribute(Memory(weights_bytes=80, program_bytes=50, peak_rss_bytes=100))
    assert counted_twice is not None
    assert counted_twice.unattributed_bytes == -30
    assert not counted_twice.adds_up


@pytest.mark.parametrize("absent", ["weights_bytes", "load_bytes"])
def test_nothing_is_attributed_where_a_part_is_not_known(absent: str) -> None:
    assert attribute(msgspec.structs.replace(ACCELERATOR, **{absent: None})) is None
    assert attribute(Memory()) is None


def test_the_table_has_the_parts_of_the_trial_that_reached_the_peak() -> None:
    low = msgspec.structs.replace(ACCELERATOR, peak_allocated_bytes=1100 * MIB, drafter_bytes=0)
    (row,) = summary(run(trial(cell(), memory=low), trial(cell(), memory=ACCELERATOR, prompt_id="p1")))
    (line,) = memory_table([row])
    assert line["peak"] == "1.270"
    assert line["drafter"] == "0.098"
    assert line["unattributed"] == "0.010"


def test_several_devices_have_a_peak_each_and_none_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the allocators; that two of them hold one model cannot be shown without two devices."""
    asked: list[str] = []
    peaks = {"cuda:0": 3 * MIB, "cuda:1": 5 * MIB}
    allocator = SimpleNamespace(
        max_memory_allocated=lambda device: peaks[str(device)],
        memory_allocated=lambda device: peaks[str(device)] // 2,
        reset_peak_memory_stats=lambda device: asked.append(str(device)),
    )
    monkeypatch.setattr(torch, "accelerator", SimpleNamespace(memory=allocator, synchronize=lambda device: None))
    monkeypatch.setattr(meters.Nvml, "find", lambda device: None)
    gauges = meters.gauges(torch.device("cuda:0"), [torch.device("cuda:0"), torch.device("cuda:1")] * 2)
    gauges.reset()
    assert asked == list(peaks)
    memory = gauges.memory()
    assert memory.peak_allocated_by_device == peaks
    assert memory.peak_allocated_bytes is None
    other = msgspec.structs.replace(memory, peak_allocated_by_device={"cuda:0": 4 * MIB, "cuda:1": MIB})
    (row,) = summary(run(trial(cell(), memory=memory), trial(cell(), memory=other, prompt_id="p1")))
    assert row.peak_by_device == {"cuda:0": 4 * MIB, "cuda:1": 5 * MIB}
    assert row.tokens_per_second_per_gib is None
    assert record(row, [row])["peak GiB"] == "cuda:0 0.004; cuda:1 0.005"


# --- NVML ------------------------------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


def library(known: str, **answers: Any) -> Any:
    """A pynvml that knows one device, and answers these questions about it."""

    def by_uuid(name: str) -> str:
        if name != known:
            raise NVMLError
        return name

    def answering(value: Any) -> Any:
        return lambda handle, *arguments: value[arguments[0]] if isinstance(value, dict) else value

    constants = {"NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0, "NVMLError": NVMLError}
    functions = {name: answering(value) for name, value in answers.items()}
    return SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=by_uuid, **constants, **functions)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    properties = SimpleNamespace(uuid="1-2-3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("visible", "known"), [(None, "GPU-1-2-3"), ("3,1", "GPU-1-2-3"), ("MIG-7-8", "MIG-7-8"), (None, "MIG-1-2-3")]
)
def test_a_device_is_found_by_its_uuid(
    visible: str | None, known: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setitem(sys.modules, "pynvml", library(known))
    found = meters.Nvml.find(gpu)
    assert found is not None
    assert found.handle == known


def test_a_gpu_that_shares_the_hosts_memory_is_told_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(handle: Any) -> Any:
        raise NVMLError

    nvml = library("GPU-1", nvmlDeviceGetName="GB10", nvmlDeviceGetUUID="GPU-1")
    nvml.nvmlDeviceGetCount, nvml.nvmlDeviceGetHandleByIndex = lambda: 1, lambda index: index
    nvml.nvmlSystemGetDriverVersion, nvml.nvmlDeviceGetMemoryInfo = lambda: "580", refused
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (found,) = host.nvidia_devices()
    assert found == {"name": "GB10", "uuid": "GPU-1", "memory_bytes": None, "driver": "580"}


def test_a_device_that_the_driver_does_not_know_has_no_figures(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library("GPU-9"))
    assert meters.Nvml.find(gpu) is None


def test_what_the_driver_does_not_tell_is_absent_not_zero() -> None:
    assert meters.Nvml(library("x"), "x").state() == DeviceState()
    assert meters.Nvml(library("x"), "x").energy_joules() is None


@pytest.mark.parametrize(
    "name", ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"]
)
def test_clocks_temperature_and_reasons_are_read(name: str) -> None:
    clocks = {1: 1980, 2: 2619}
    told = {"nvmlDeviceGetClockInfo": clocks, "nvmlDeviceGetTemperature": 61, "nvmlDeviceGetPowerUsage": 350_500}
    state = meters.Nvml(library("x", **told, **{name: 0x1 | 0x4 | 0x40}), "x").state()
    assert state == DeviceState(
        core_clock_hz=1_980_000_000,
        memory_clock_hz=2_619_000_000,
        temperature_celsius=61,
        power_watts=350.5,
        throttle_reasons=["sw_power_cap", "hw_thermal_slowdown"],
    )


def test_a_throttled_run_is_a_warning_and_an_idle_one_is_not() -> None:
    hot = DeviceState(throttle_reasons=["sw_thermal_slowdown"])
    trials = [trial(cell(), device_after=hot), trial(cell(), prompt_id="p1", device_before=DeviceState())]
    lines = warnings(run(*trials), summary(run(*trials)))
    assert [line for line in lines if "throttled around 1 of 2 trials (sw_thermal_slowdown)" in line]
    assert not [line for line in warnings(run(trials[1]), summary(run(trials[1]))) if "throttled" in line]


@pytest.mark.parametrize("asked", [None, 5 * MIB])
def test_the_allocator_says_what_its_blocks_are_larger(asked: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.current": 7 * MIB}
    if asked is not None:
        stats["requested_bytes.all.current"] = asked
    monkeypatch.setattr(
        torch, "accelerator", SimpleNamespace(memory=SimpleNamespace(memory_stats=lambda device: stats))
    )
    monkeypatch.setattr(meters.Nvml, "find", lambda device: None)
    gauges = meters.gauges(torch.device("cuda:0"))
    assert gauges.rounding_bytes() == (None if asked is None else 2 * MIB)
