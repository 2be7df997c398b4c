"""Facts about the machine, for the manifest and for `doctor`. Asking leaves no context on an accelerator."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.paths import cache_dir

PACKAGES = (
    *("spec-harness", "torch", "transformers", "tokenizers", "accelerate", "bitsandbytes", "safetensors", "numpy"),
    "msgspec",
)
VECTOR_UNITS = ("amx", "avx", "fma", "f16c", "sse4", "asimd", "sve", "bf16", "i8mm")
DEVICES = ("cuda", "xpu", "mps", "cpu")


def facts(device: str) -> dict[str, Any]:
    """What a reader needs to judge the figures that cells on `device` give."""
    import psutil
    import torch

    environment = os.environ | worker_environment(device)
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "instruction_sets": instruction_sets(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "openmp": {name: value for name, value in environment.items() if name in SPIN_SETTINGS},
        "memory_bytes": psutil.virtual_memory().total,
        "devices": nvidia_devices(),
        "git_commit": git_commit(Path.cwd()),
    }


SPIN_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def worker_environment(device: str) -> dict[str, str]:
    """What a worker's environment has beyond ours; the user's own settings stay.

    OpenMP threads spin while they wait for one another: for nothing, where another program has the core of the one
    waited for. GNU's runtime spins 300,000 times before it sleeps. Measured on two cores, one token of a 135M model in
    float32: 20,000 spins cost 1.5 % on an idle machine and make a crowded one 9 times as fast; none at all costs 47 %.
    """
    return {"GOMP_SPINCOUNT": "20000"} if device == "cpu" and not os.environ.keys() & set(SPIN_SETTINGS) else {}


def contention(device: str) -> list[str]:
    """Warnings, in sentences, of what else takes this machine's time or power just now. Takes half a second."""
    import psutil

    lines = []
    busy = psutil.cpu_percent(interval=0.5) / 100
    if busy > (0.2 if device == "cpu" else 0.8):
        lines.append(
            f"Other programs used {busy:.0%} of the CPU as the run began: speeds are too low, and vary. "
            "Close them and measure again."
        )
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is not None and battery.power_plugged is False:
        lines.append("The machine ran on its battery, which lowers clock speeds. Plug it in and measure again.")
    return lines


def versions() -> dict[str, str]:
    return {name: found for name in PACKAGES if (found := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instruction_sets() -> str:
    """The vector units that libraries choose their kernels by; empty where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return " ".join(sorted(flag for flag in flags if flag.startswith(VECTOR_UNITS)))


def nvidia_devices() -> list[dict[str, Any]]:
    """The NVIDIA GPUs of the host, whether visible to this process or not."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or one that it cannot talk to: no NVIDIA devices to tell of
        return []
    driver = nvml_answer(pynvml, "nvmlSystemGetDriverVersion")
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [
        {
            "name": nvml_answer(pynvml, "nvmlDeviceGetName", handle),
            "uuid": nvml_answer(pynvml, "nvmlDeviceGetUUID", handle),
            "memory_bytes": getattr(nvml_answer(pynvml, "nvmlDeviceGetMemoryInfo", handle), "total", None),
            "driver": driver,
        }
        for handle in handles
    ]


def nvml_answer(library: Any, question: str, *arguments: Any) -> Any:
    """The answer, or None where this device or driver has none: the memory of a GPU that shares the host's, clocks of a
    MIG instance."""
    try:
        return getattr(library, question)(*arguments)
    except (library.NVMLError, AttributeError):
        return None


def git_commit(directory: Path) -> str | None:
    """Of the working directory, `+` where something is not committed; None outside a repository."""
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def present(device: str) -> bool:
    import torch

    match device:
        case "cuda":
            return torch.cuda.is_available()
        case "xpu":
            return torch.xpu.is_available()
        case "mps":
            return torch.backends.mps.is_available()
    return device == "cpu"


def choose_device(wanted: str) -> str:
    """`auto` is the first of cuda, xpu, mps and cpu that is there. Raises UserError for one that is not."""
    here = [device for device in DEVICES if present(device)]
    if wanted == "auto":
        return here[0]
    if wanted not in DEVICES:
        raise UserError(f"unknown device {wanted!r}: choose auto, {', '.join(DEVICES)}")
    if wanted not in here:
        raise UserError(f"no {wanted} here: torch sees {', '.join(here)}; `python -m harness doctor` says why")
    return wanted


# --- doctor ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One line of `doctor`."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    "what to do where it is not ok"
    needed: bool = True
    "False where `run` does without"


def checks(*, ask_hub: bool = False) -> list[Check]:
    """What this machine can run, and why not."""
    machine = [_python(), _torch(), _device(), _bf16(), _bitsandbytes(), _nvml(), _disk()]
    return [*machine, _default_model(), *_drafters(), *([_hub()] if ask_hub else [])]


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, platform.python_version(), "install Python 3.11 or newer")


def _torch() -> Check:
    found = _version("torch")
    return Check("torch", found is not None, f"{found}, transformers {_version('transformers')}", "pip install torch")


def _device() -> Check:
    gpus = [
        f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu["memory_bytes"] else str(gpu["name"])
        for gpu in nvidia_devices()
    ]
    match choose_device("auto"):
        case "cpu" if gpus:
            advice = "install the CUDA build of torch, or look at CUDA_VISIBLE_DEVICES"
            return Check("device", False, f"cpu, although the driver shows {gpus[0]}", advice)
        case "cpu":
            return Check("device", True, f"cpu: {cpu_name()}, {os.cpu_count()} threads")
        case "cuda":
            return Check("device", True, "cuda: " + "; ".join(gpus))
        case other:
            return Check("device", True, other)


def _bf16() -> Check:
    from harness import weights

    device = choose_device("auto")
    fast = weights.default_bits(device).width == 16
    found = "multiplied in hardware: the default is --bits 16" if fast else "slow on this CPU: the default is --bits 32"
    return Check("bfloat16", fast, found, needed=False)


def _bitsandbytes() -> Check:
    found = _version("bitsandbytes")
    told, advice = f"bitsandbytes {found or 'missing'}", "pip install bitsandbytes"
    return Check("8 and 4 bits", found is not None, told, advice, needed=False)


def _nvml() -> Check:
    devices = nvidia_devices()
    advice = "without it there are no figures for energy and process memory; it comes with NVIDIA's driver"
    found = ", ".join(device["name"] for device in devices) or "no NVIDIA GPU"
    return Check("NVML", bool(devices), found, advice, needed=False)


def _disk() -> Check:
    from harness import smollm2

    folder = cache_dir()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(there).free
    advice = "make room, or set HARNESS_CACHE to a folder on a larger disk"
    enough = free_bytes > 2 * smollm2.NEEDED_BYTES
    return Check("disk", enough, f"{free_bytes / 2**30:.1f} GiB free for {folder}", advice)


def _default_model() -> Check:
    from harness import smollm2

    directory = smollm2.location()
    ok = (directory / "model.safetensors").is_file()
    advice = "the first run fetches it (93 MB) and converts it (half a minute)"
    found = smollm2.LABEL + (" in the cache" if ok else " not in the cache yet")
    return Check("default model", ok, found, advice, needed=False)


def _drafters() -> list[Check]:
    from harness import drafter, method, smollm2

    lines = []
    for name in method.installed():
        if method.find(name).needs_drafter:
            path = drafter.find(name, None, smollm2.LABEL)
            advice = f"python -m harness train --methods {name}"
            found = str(path or "none for the default model")
            lines.append(Check(f"{name} drafter", path is not None, found, advice, needed=False))
    return lines


def _hub() -> Check:
    from huggingface_hub import HfApi

    advice = "check the network and HF_ENDPOINT; local directories and the default model need no hub"
    try:
        HfApi().model_info("HuggingFaceTB/SmolLM2-135M-Instruct", timeout=10)
    except Exception as error:
        return Check("hub", False, type(error).__name__, advice, needed=False)
    return Check("hub", True, "reachable", needed=False)
