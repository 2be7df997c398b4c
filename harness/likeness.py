"""Which runs may be compared in what: hosts, tasks, prompts and libraries, and sentences on how two runs differ."""

from __future__ import annotations

import re
from typing import Any

from harness.results import Run

Facts = dict[str, Any]


def host_facts(run: Run) -> Facts:
    """What must be equal for seconds and bytes to be comparable."""
    host = run.manifest.host
    names = sorted({trial.device_name for trial in run.rows if trial.device_name})
    known = ("cpu", "threads", "torch_threads", "openmp", "instruction_sets", "devices")
    return {name: host.get(name) for name in known} | {"device name": names}


def task_facts(run: Run) -> Facts:
    """What was decoded, and how."""
    of = run.manifest
    names = (
        "model",
        "weights_sha256",
        "first_answers_sha256",
        "max_new_tokens",
        "temperature",
        "top_p",
        "system",
        "raw",
    )
    # Named only where they were asked for, so that what was written before they existed stays the same task.
    asked = {name: value for name in ("acceptance", "vram_budget_bytes", "device_map") if (value := getattr(of, name))}
    if of.isolation == "run":  # peaks of a shared process are others than a cell's own
        asked["isolation"] = of.isolation
    return {name: getattr(of, name) for name in names} | {
        "raw": of.raw,
        "seed": of.seed if of.temperature > 0 else None,
        **asked,
    }


def prompt_facts(run: Run) -> Facts:
    return {"prompt set": run.manifest.prompt_set, "prompts": run.manifest.prompt_set_sha256}


def library_facts(run: Run) -> Facts:
    """Versions of everything but this program, which is what is being tested."""
    return {name: found for name, found in run.manifest.versions.items() if name != "spec-harness"}


def unlike(base: Run, new: Run) -> list[str]:
    """Why absolute figures of two runs must not be compared."""
    reasons = []
    for one, side in ((base, "BASE"), (new, "NEW")):
        if not one.manifest.host:
            reasons.append(f"{side} has no manifest.json beside its trials, so its host is not known")
    if base.manifest.host and new.manifest.host:
        reasons += differences("the hosts differ", host_facts(base), host_facts(new))
    reasons += differences("the models or settings differ", task_facts(base), task_facts(new))
    reasons += differences("the prompts differ", prompt_facts(base), prompt_facts(new))
    reasons += differences("the schemas differ", {"schema": schemas(base)}, {"schema": schemas(new)})
    return reasons


def schemas(run: Run) -> list[int]:
    return sorted({run.manifest.schema, *(trial.schema for trial in run.rows)})


def differences(what: str, base: Facts, new: Facts) -> list[str]:
    """One sentence for all that differs, or none."""
    parts = [f"{name} {short(base[name])} and {short(new.get(name))}" for name in base if base[name] != new.get(name)]
    parts += [f"{name} {short(None)} and {short(new[name])}" for name in new if name not in base]
    return [f"{what}: {'; '.join(parts)}"] if parts else []


def short(value: Any) -> str:
    """A value as one reads it in a sentence; hashes by their start."""
    if value in (None, "", [], {}):
        return "unknown"
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text


def same_fingerprint(base: Run, new: Run) -> bool:
    """Whether both must decode the same text to the bit: one instruction set, one build of the libraries, one task."""
    facts = (host_facts, task_facts, prompt_facts, library_facts)
    known = all(run.manifest.host and run.manifest.versions for run in (base, new))
    return known and base.manifest.temperature == 0 and all(fact(base) == fact(new) for fact in facts)
