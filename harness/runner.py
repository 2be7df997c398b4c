"""A run: the manifest, the prepare step, then rounds of cells in shuffled order, each in a process of its own.

Everything lies in one directory and is written as it becomes known, so a run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from harness import child, drafter, host, metrics, quality, worker
from harness.errors import UserError
from harness.plan import PUBLISHABLE_ROUNDS, Job, Plan, RunJob
from harness.results import Manifest, Outcome, Training, read_run, write_manifest
from harness.stopping import Pace
from harness.weights import ModelSource, weights_sha256

IDENTITY = (
    *("model", "prompt_set", "prompt_set_sha256", "rounds", "seed", "temperature", "top_p", "max_new_tokens"),
    *("system", "raw", "acceptance", "vram_budget_bytes", "device_map", "isolation"),
)
"""Fields of a manifest that must not change when a run goes on."""

ROUNDS_ENDED = "Rounds ended early:"
LOCK = ".lock"

MACHINE = ("cpu", "threads", "torch_threads", "openmp", "devices")
"""Nor must these facts of the host: one run is one machine."""


def execute(plan: Plan, out: Path | None, on_event: child.Emit, *, command: Sequence[str] = ()) -> Path:
    """Run the plan, or what is left of it, into `out` (default: a new directory in `out/`); the directory.

    Raises UserError where `out` holds a run of another plan or cannot be written to or the model cannot be decoded, and
    KeyboardInterrupt, with the worker stopped, on Ctrl-C.
    """
    directory = (out or default_directory(plan)).absolute()
    with _alone(directory):
        _execute(plan, directory, on_event, command)
    return directory


def _execute(plan: Plan, directory: Path, on_event: child.Emit, command: Sequence[str]) -> None:
    try:
        manifest = _open(plan, directory, command)
    except OSError as error:
        raise _unwritable(directory, error) from error
    contention = host.contention(plan.device)
    prepared = _prepare(plan, directory, on_event)
    jobs = [job for round in range(plan.fewest_rounds) for job in _round(round, plan, directory, prepared.sources)]
    left = _left(jobs, plan)
    noticed = [*prepared.warnings, *(contention if left else [])]
    _record(directory, manifest, prepared, [*plan.warnings(), *noticed])
    for warning in noticed:
        on_event(child.Warned(warning))
    if left and not manifest.quality:
        _quality(plan, directory, prepared.sources, on_event)
        manifest = read_run(directory).manifest
    on_event(child.Left(left))
    if plan.precision is None:
        for batch in _batches(jobs, plan.isolation):
            _work(batch, plan, directory / "workers", on_event)
    else:
        _until_precise(plan, directory, manifest, prepared.sources, on_event)
    _judge(plan, directory, prepared.sources, on_event)


def _quality(plan: Plan, directory: Path, sources: dict[str, ModelSource], on_event: child.Emit) -> None:
    """Have targets that are not the base at 32 bits held against it; the run goes on where they cannot be."""
    if quality.changed(plan):
        _beside("quality", "changed targets could not be held against 32 bits", plan, directory, sources, on_event)


def _judge(plan: Plan, directory: Path, sources: dict[str, ModelSource], on_event: child.Emit) -> None:
    """Have texts that differ from their baseline's scored again in float64; what cannot be stays unjudged."""
    if metrics.unjudged(read_run(directory)):
        _beside("judge", "differing answers could not be judged in float64", plan, directory, sources, on_event)


def _beside(
    step: str, failure: str, plan: Plan, directory: Path, sources: dict[str, ModelSource], on_event: child.Emit
) -> None:
    """Run a step about a whole run in a process of its own; where it fails, a warning says so."""
    path, log = (directory / "workers" / f"{step}.{end}" for end in ("json", "log"))
    path.write_bytes(msgspec.json.encode(RunJob(directory=str(directory), sources=sources)))
    status = child.run(f"harness.{step}", [path], log, on_event, host.worker_environment(plan.device))
    if status != 0:
        on_event(child.Warned(f"{failure}: {_death(status, log)[1]}"))


def _left(jobs: Iterable[Job], plan: Plan) -> int:
    return sum(len(worker.missing(job, plan)) for job in jobs if plan.cells[job.cell].unsupported is None)


def _until_precise(
    plan: Plan, directory: Path, manifest: Manifest, sources: dict[str, ModelSource], on_event: child.Emit
) -> None:
    """Round after round, until the intervals are narrow or the time is over; the manifest says which."""
    assert plan.precision is not None
    assert plan.time_budget_seconds is not None
    pace = Pace(plan.precision, plan.time_budget_seconds, plan.fewest_rounds, plan.rounds)
    began = time.monotonic()
    longest = 0.0
    for round in range(plan.rounds):
        started = time.monotonic()
        jobs = list(_round(round, plan, directory, sources))
        if round >= plan.fewest_rounds:
            on_event(child.Left(_left(jobs, plan)))
        for job in jobs:
            _work([job], plan, directory / "workers", on_event)
        now, run = time.monotonic(), read_run(directory)
        longest = max(longest, now - started)
        done = 1 + max(row.round for row in run.rows)
        manifest.rounds = max(done, plan.fewest_rounds)  # what whoever interrupts it had planned at least
        write_manifest(directory, manifest)
        if why := pace.ended(done, metrics.summary(run), now - began, longest):
            break
    manifest.rounds = done
    manifest.preliminary |= manifest.rounds < PUBLISHABLE_ROUNDS
    manifest.warnings = [line for line in manifest.warnings if not line.startswith(ROUNDS_ENDED)]
    manifest.warnings += [f"{ROUNDS_ENDED} {why}."] if why and not why.startswith("precise") else []
    write_manifest(directory, manifest)


def default_directory(plan: Plan) -> Path:
    digest = hashlib.sha256(msgspec.json.encode(plan)).hexdigest()[:6]
    return Path("out") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{digest}"


# --- the directory ---------------------------------------------------------------------------------------------------


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """The directory, made where there is none, while no other run writes into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(directory)
        lock = FileLock(directory / LOCK, timeout=0).acquire()
    except OSError as error:
        if isinstance(error, Timeout):
            raise UserError(f"another run is writing into {directory}: wait for it, or give another --out") from error
        raise _unwritable(directory, error) from error
    with lock:
        yield


def _refuse_foreign(directory: Path) -> None:
    """Raises UserError for a directory that has something in it, but no run; `_open` judges one with trials."""
    begun = (directory / "trials.jsonl").is_file()
    if not begun and any(path.name != LOCK for path in directory.iterdir()):
        try:
            read_run(directory)
        except UserError as error:
            raise UserError(f"{directory} is not empty and holds no run of this program: give another --out") from error


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {directory} ({error.strerror}): give another --out")


def _open(plan: Plan, directory: Path, command: Sequence[str]) -> Manifest:
    """Make the run's directory, or check that it holds this very plan."""
    manifest = _manifest(plan, directory.name, command)
    if (directory / "trials.jsonl").is_file():
        begun = read_run(directory).manifest
        if differences := _differences(begun, manifest):
            raise UserError(f"{directory} holds another run ({'; '.join(differences)}): give another --out")
        manifest = msgspec.structs.replace(
            begun, precision=manifest.precision, time_budget_seconds=manifest.time_budget_seconds
        )
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
        rounds=plan.fewest_rounds,
        precision=plan.precision,
        time_budget_seconds=plan.time_budget_seconds,
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
        isolation=plan.isolation,
        preliminary=plan.preliminary,
        host=host.facts(plan.device),
        versions=host.versions(),
        training=_training(plan),
        drafters=_drafters(plan),
    )


def _differences(begun: Manifest, now: Manifest) -> list[str]:
    """How two plans, or the machines that they run on, differ, in words."""
    before, after = (
        {name: getattr(one, name) for name in IDENTITY}
        | {name: one.host.get(name) for name in MACHINE}
        | {f"the version of {name}": found for name, found in one.versions.items()}
        for one in (begun, now)
    )
    if now.precision is not None:  # what is there counts, and more is measured where that is not precise enough
        after["rounds"] = before["rounds"]
    words = [
        f"{name} was {before.get(name)!r}, now {after.get(name)!r}"
        for name in before | after
        if before.get(name) != after.get(name)
    ]
    known, found = begun.drafters or {}, now.drafters or {}
    words += [
        f"the drafter of cell {id} was {known[id]}, now {found[id]}"
        for id in sorted(known.keys() & found.keys())
        if known[id] != found[id]
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


def _drafters(plan: Plan) -> dict[str, str]:
    """SHA-256 of what each cell drafts with, by the cell's id; nothing for a shape, whose drafters are random."""
    if plan.model.kind == "shape":
        return {}
    paths = {one.cell.id: Path(one.drafter) for one in plan.cells if one.drafter is not None}
    return {id: weights_sha256(drafter.files(path)) for id, path in paths.items() if path.exists()}


def _prepare(plan: Plan, directory: Path, on_event: child.Emit) -> child.Prepared:
    said: list[child.Event] = []

    def listen(event: child.Event) -> None:
        said.append(event)
        on_event(event)

    log = directory / "workers" / "prepare.log"
    status = child.run("harness.prepare", [directory], log, listen, host.worker_environment(plan.device))
    match said[-1:]:
        case [child.Prepared() as prepared]:
            return prepared
        case [child.Refused(message)]:
            raise UserError(message)
    raise UserError(f"the prepare step died ({_death(status, log)[1]}): see {log}")


def _record(directory: Path, manifest: Manifest, prepared: child.Prepared, warnings: Sequence[str]) -> None:
    """Write down what the workers will use, and what to beware of; a run that goes on must use the same."""
    for name in ("weights_sha256", "first_answers_sha256"):
        before, now = getattr(manifest, name), getattr(prepared, name)
        if before not in (None, now):
            raise UserError(f"{directory} holds another run ({name} was {before}, now {now}): give another --out")
        setattr(manifest, name, now)
    manifest.roofline = manifest.roofline or prepared.roofline
    manifest.warnings = list(dict.fromkeys((*manifest.warnings, *warnings)))
    write_manifest(directory, manifest)


# --- one cell in one round -------------------------------------------------------------------------------------------


def _round(round: int, plan: Plan, directory: Path, sources: dict[str, ModelSource]) -> Iterator[Job]:
    """Every cell, in the order in which they run in this round."""
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


def _batches(jobs: Sequence[Job], isolation: str) -> list[list[Job]]:
    """Which jobs share a process."""
    match isolation:
        case "run":
            return [list(jobs)]
        case "cell":
            cells = dict.fromkeys(job.cell for job in jobs)
            return [[job for job in jobs if job.cell == cell] for cell in cells]
    return [[job] for job in jobs]


def _work(jobs: Sequence[Job], plan: Plan, folder: Path, on_event: child.Emit) -> None:
    """Run workers for what is missing of these jobs, and see to it that every turn has a row afterwards."""
    for job in jobs:
        if (reason := plan.cells[job.cell].unsupported) is not None and (turns := worker.missing(job, plan)):
            worker.fail(job, plan, turns, "unsupported", reason, lambda event: None)
    left = [job for job in jobs if worker.missing(job, plan)]
    while left:
        first = left[0]
        planned = plan.cells[first.cell]
        on_event(worker.started(first, plan))
        name = f"{first.cell}-{planned.cell.method}.round-{first.round}"
        paths = [folder / f"{job.cell}-{plan.cells[job.cell].cell.method}.round-{job.round}.json" for job in left]
        for job, path in zip(left, paths, strict=True):
            path.write_bytes(msgspec.json.encode(job))
        log = folder / f"{name}.log"
        status = child.run("harness.worker", paths, log, on_event, host.worker_environment(planned.cell.device))
        if status == 0:
            return
        # The job that it died in has failed; a new process does the rest.
        outcome, reason = _death(status, log)
        place = next((place for place, job in enumerate(left) if worker.missing(job, plan)), len(left) - 1)
        worker.fail(left[place], plan, worker.missing(left[place], plan), outcome, reason, on_event)
        left = left[place + 1 :]


def _death(status: int, log: Path) -> tuple[Outcome, str]:
    if status >= 0:
        return "error", f"the worker exited with {status}: {_last_line(log)}"
    hint = " (the system does that when memory runs out)" if status == -signal.SIGKILL else ""
    return "killed", f"killed by {signal.Signals(-status).name}{hint}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"
