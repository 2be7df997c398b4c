"""A run: the manifest, the prepare step, then rounds of cells in shuffled order, each in a process of its own.

Everything lies in one directory and is written as it becomes known, so a run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from harness import child, drafter, host, worker
from harness.errors import UserError
from harness.plan import Job, Plan
from harness.results import Manifest, Outcome, Training, read_run, write_manifest
from harness.weights import ModelSource

IDENTITY = (
    *("model", "prompt_set", "prompt_set_sha256", "rounds", "seed", "temperature", "top_p", "max_new_tokens"),
    *("system", "raw", "acceptance", "vram_budget_bytes", "device_map"),
)
"""Fields of a manifest that must not change when a run goes on."""

MACHINE = ("cpu", "threads", "torch_threads", "openmp", "devices")
"""Nor must these facts of the host: one run is one machine."""


def execute(plan: Plan, out: Path | None, on_event: child.Emit, *, command: Sequence[str] = ()) -> Path:
    """Run the plan, or what is left of it, into `out` (default: a new directory in `out/`); the directory.

    Raises UserError where `out` holds a run of another plan or cannot be written to or the model cannot be decoded, and
    KeyboardInterrupt, with the worker stopped, on Ctrl-C.
    """
    directory = (out or default_directory(plan)).absolute()
    try:
        manifest = _open(plan, directory, command)
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror}): give another --out") from error
    contention = host.contention(plan.device)
    prepared = _prepare(plan, directory, on_event)
    jobs = list(_jobs(plan, directory, prepared.sources))
    runnable = [job for job in jobs if plan.cells[job.cell].unsupported is None]
    left = sum(len(worker.missing(job, plan)) for job in runnable)
    noticed = [*prepared.warnings, *(contention if left else [])]
    _record(directory, manifest, prepared, [*plan.warnings(), *noticed])
    for warning in noticed:
        on_event(child.Warned(warning))
    on_event(child.Left(left))
    for job in jobs:
        _work(job, plan, directory / "workers", on_event)
    return directory


def default_directory(plan: Plan) -> Path:
    digest = hashlib.sha256(msgspec.json.encode(plan)).hexdigest()[:6]
    return Path("out") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{digest}"


# --- the directory ---------------------------------------------------------------------------------------------------


def _open(plan: Plan, directory: Path, command: Sequence[str]) -> Manifest:
    """Make the run's directory, or check that it holds this very plan."""
    manifest = _manifest(plan, directory.name, command)
    if (directory / "trials.jsonl").is_file():
        begun = read_run(directory).manifest
        if differences := _differences(begun, manifest):
            raise UserError(f"{directory} holds another run ({'; '.join(differences)}): give another --out")
        manifest = begun
    elif directory.exists() and any(directory.iterdir()) and not (directory / "manifest.json").is_file():
        raise UserError(f"{directory} is not empty and holds no run: give another --out")
    (directory / "workers").mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_bytes(msgspec.json.encode(plan))
    write_manifest(directory, manifest)
    return manifest


def _manifest(plan: Plan, run: str, command: Sequence[str]) -> Manifest:
    return Manifest(
        run=run,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=list(command),
        model=plan.model.name,
        prompt_set=plan.prompt_set.name,
        prompt_set_sha256=plan.prompt_set.sha256,
        prompts=len(plan.prompt_set.prompts),
        turns=max(len(prompt.turns) for prompt in plan.prompt_set.prompts),
        cells=[one.cell for one in plan.cells],
        rounds=plan.rounds,
        seed=plan.seed,
        temperature=plan.temperature,
        top_p=plan.top_p,
        max_new_tokens=plan.max_new_tokens,
        system=plan.system,
        raw=plan.raw,
        synthetic=plan.synthetic,
        acceptance=plan.acceptance,
        vram_budget_bytes=plan.vram_budget_bytes,
        device_map=plan.device_map,
        preliminary=plan.preliminary,
        host=host.facts(plan.device),
        versions=host.versions(),
        training=_training(plan),
    )


def _differences(begun: Manifest, now: Manifest) -> list[str]:
    """How two plans, or the machines that they run on, differ, in words."""
    before, after = (
        {name: getattr(one, name) for name in IDENTITY}
        | {name: one.host.get(name) for name in MACHINE}
        | {f"the version of {name}": found for name, found in one.versions.items()}
        for one in (begun, now)
    )
    words = [
        f"{name} was {before.get(name)!r}, now {after.get(name)!r}"
        for name in before | after
        if before.get(name) != after.get(name)
    ]
    if begun.training != now.training:
        words.append("a drafter has been trained anew")
    old, new = ({cell.id: cell for cell in one.cells} for one in (begun, now))
    words += [f"cell {id} is {'new' if id in new else 'gone'}" for id in sorted(old.keys() ^ new.keys())]
    return words + [f"cell {id} has other options" for id in sorted(old.keys() & new.keys()) if old[id] != new[id]]


def _training(plan: Plan) -> list[Training]:
    """What the drafters cost, where their checkpoints say so."""
    found: list[Training] = []
    for path, name in plan.drafters.items():
        if not path.exists():  # random, and made in the prepare step
            continue
        _, cost = drafter.metadata(path)
        told = {"method": name, "drafter": path.name, "file_bytes": path.stat().st_size} | cost
        with suppress(msgspec.ValidationError):  # somebody else's checkpoint, which says nothing about its training
            found.append(msgspec.convert(told, Training))
    return found


def _prepare(plan: Plan, directory: Path, on_event: child.Emit) -> child.Prepared:
    said: list[child.Event] = []

    def listen(event: child.Event) -> None:
        said.append(event)
        on_event(event)

    log = directory / "workers" / "prepare.log"
    child.run("harness.prepare", directory, log, listen, host.worker_environment(plan.device))
    match said[-1:]:
        case [child.Prepared() as prepared]:
            return prepared
        case [child.Refused(message)]:
            raise UserError(message)
    raise RuntimeError(f"the prepare step died; {log} ends with: {_last_line(log)}")


def _record(directory: Path, manifest: Manifest, prepared: child.Prepared, warnings: Sequence[str]) -> None:
    """Write down what the workers will use, and what to beware of; a run that goes on must use the same."""
    for name in ("weights_sha256", "first_answers_sha256"):
        before, now = getattr(manifest, name), getattr(prepared, name)
        if before not in (None, now):
            raise UserError(f"{directory} holds another run ({name} was {before}, now {now}): give another --out")
        setattr(manifest, name, now)
    manifest.warnings = list(dict.fromkeys((*manifest.warnings, *warnings)))
    write_manifest(directory, manifest)


# --- one cell in one round -------------------------------------------------------------------------------------------


def _jobs(plan: Plan, directory: Path, sources: dict[str, ModelSource]) -> Iterator[Job]:
    """Every cell in every round, in the order in which they run."""
    for round in range(plan.rounds):
        for order, index in enumerate(plan.order(round)):
            yield Job(
                run=directory.name,
                plan=str(directory / "plan.json"),
                trials=str(directory / "trials.jsonl"),
                first_answers=str(directory / "first_answers.json"),
                source=sources.get(plan.cells[index].cell.weights, plan.model),
                cell=index,
                round=round,
                order=order,
            )


def _work(job: Job, plan: Plan, folder: Path, on_event: child.Emit) -> None:
    """Run a worker for what is missing of its cell and round, and see to it that every turn has a row afterwards."""
    planned = plan.cells[job.cell]
    turns = worker.missing(job, plan)
    if not turns:
        return
    if planned.unsupported is not None:
        worker.fail(job, plan, turns, "unsupported", planned.unsupported, lambda event: None)
        return
    on_event(child.Started(planned.cell.label, planned.cell.bits, job.round, job.order, len(turns)))
    path, log = (folder / f"{job.cell}-{planned.cell.method}.round-{job.round}.{end}" for end in ("json", "log"))
    path.write_bytes(msgspec.json.encode(job))
    status = child.run("harness.worker", path, log, on_event, host.worker_environment(planned.cell.device))
    if status != 0:
        outcome, reason = _death(status, log)
        worker.fail(job, plan, worker.missing(job, plan), outcome, reason, on_event)


def _death(status: int, log: Path) -> tuple[Outcome, str]:
    if status > 0:
        return "error", f"the worker exited with {status}: {_last_line(log)}"
    hint = " (the system does that when memory runs out)" if status == -signal.SIGKILL else ""
    return "killed", f"killed by {signal.Signals(-status).name}{hint}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"
