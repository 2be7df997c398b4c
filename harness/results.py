"""Result files: `out/<run>/trials.jsonl`, one line a trial, and `out/<run>/manifest.json`, the plan and the host.

Only raw values are stored, in SI units named in the field; every rate is derived in `harness.metrics` when it is read.
Fields that a newer program wrote are kept: `read_trials` gives the raw dict beside the typed row.

Schema history
    1   first version
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from harness.errors import UserError

SCHEMA = 1

BASELINE = "ar"
"the method that every speed-up is measured against"

PRELIMINARY = (
    "Preliminary: good for a first look, not for publishing. For that, use `--prompts standard --rounds 3` or more, "
    "and no --limit."
)

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError)
"what a line raises that nobody could have written so"
Outcome = Literal["ok", "oom", "error", "unsupported", "killed"]


class Cell(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One row of the plan: method x options x model x bits x runtime x device."""

    method: str
    options: dict[str, Any] = {}
    "the method's options, all of them, defaults filled in"
    label: str
    "how the user wrote it: `s3d:k=4`; unique together with bits, dtype, weights, runtime and device"
    model: str
    bits: str
    "`32` | `16` | `int8:t6` | `nf4`: the outlier threshold is part of the identity"
    dtype: str
    "what activations are computed in: `bfloat16`"
    weights: str = "base"
    "`base`, or what a method merged into the target (shared S3D): a different target with a baseline of its own"
    runtime: str = "eager"
    device: str
    "`cuda`, `cpu`, ...; the physical device is in each trial"
    batch_size: int = 1
    context: int | None = None
    "tokens prefilled before each answer; None: the prompts as long as they are"

    @property
    def id(self) -> str:
        """File-safe and unique within a run."""
        text = "-".join((self.label, self.bits, self.dtype, self.weights, self.runtime, self.device))
        return file_safe(text + ("" if self.context is None else f"-c{self.context}"))

    @property
    def target(self) -> tuple[str, ...]:
        """Cells are comparable when this is equal: same model, weights, bits, dtype, runtime, device and context."""
        context = "" if self.context is None else str(self.context)
        return (self.model, self.weights, self.bits, self.dtype, self.runtime, self.device, context)


@lru_cache(maxsize=4096)
def file_safe(text: str) -> str:
    """As a part of a file's name, which leads nowhere else."""
    return "".join(c if c.isalnum() or c in "._=+" else "-" for c in text)


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes. A field is absent (None) where the device cannot tell it; nothing is estimated here."""

    load_bytes: int | None = None
    "allocated after loading the target and the drafter, before the first prompt"
    rounding_bytes: int | None = None
    "of those, what the allocator's blocks are larger than what was asked for"
    peak_allocated_bytes: int | None = None
    "largest sum of live tensors on the accelerator during the trial"
    peak_allocated_by_device: dict[str, int] | None = None
    "of a target on several devices, which has no single peak: theirs are not reached at the same time"
    peak_reserved_bytes: int | None = None
    process_bytes: int | None = None
    "NVML's figure for the process, device context included"
    peak_rss_bytes: int | None = None
    "largest resident set of the process so far: on a CPU, the peak that counts"
    weights_bytes: int | None = None
    drafter_bytes: int | None = None
    cache_bytes: int | None = None
    graphs_bytes: int | None = None
    "what captured graphs hold beyond all these"
    program_bytes: int | None = None
    "on a CPU: resident before anything was loaded"


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """How an accelerator was doing at one moment. A field is absent (None) where the driver does not tell it."""

    core_clock_hz: int | None = None
    memory_clock_hz: int | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None
    throttle_reasons: list[str] | None = None
    "why the clocks were lowered, in NVML's words (`sw_power_cap`, `hw_thermal_slowdown`); empty: they were not"


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt's turn decoded once in one cell. A failed trial has an outcome, a reason and no measurements."""

    schema: int = SCHEMA
    run: str
    cell: Cell
    round: int
    order: int
    "position of the cell in this round's shuffled order"
    prompt_set: str
    prompt_id: str
    category: str
    turn: int
    outcome: Outcome
    reason: str | None = None
    lossless: bool = True
    "what the method promises; a method that is lossy by design says False"
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    synthetic: bool = False
    "random weights or drawn acceptance: times and memory were measured, texts and acceptance were not"
    drawn_acceptance: list[float] | None = None
    "the chances by depth that the accepted lengths were drawn with; None where the target decided"
    device_name: str | None = None
    device_uuid: str | None = None
    started_unix_seconds: float | None = None
    prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    new_tokens: list[int] | None = None
    "committed ids after the prompt, up to and including the first end-of-sequence, never past the limit"
    text: str | None = None
    token_texts: list[str] | None = None
    "text piece of each new token, only in round 0"
    warm_up_passes: int | None = None
    "short texts decoded before the first trial of the process"
    warm_up_settled: bool | None = None
    "whether the last of them was no longer faster than the one before"
    prefill_seconds: float | None = None
    "prompt forward and the method's own start, to the first token known on the host"
    decode_seconds: float | None = None
    "everything after the first token"
    round_seconds: list[float] | None = None
    "one per verify pass; sums to decode_seconds but for the loop's own first and last instant"
    drafted: list[int] | None = None
    "nodes drafted, one per verify pass"
    drafted_depth: list[int] | None = None
    "depth of the deepest drafted node, one per verify pass"
    accepted: list[int] | None = None
    "nodes the verdict accepted, one per verify pass, before clipping"
    committed: list[int] | None = None
    "tokens that entered the text, one per verify pass, after clipping; sums to len(new_tokens) - 1"
    phase_seconds: dict[str, float] | None = None
    "where decode_seconds went, summed over the rounds, on the device's clock: draft, verify, accept, commit, host"
    captures: int | None = None
    "graphs captured, or layers compiled, in this process so far; none of them while this trial was measured"
    capture_seconds: float | None = None
    "what those took, warm-up runs included"
    pass_bytes: int | None = None
    """what one pass of plain decoding has to read at this text's middle: weights (the input embedding only where it is
    the output head too), and the keys and values so far"""
    host_syncs: int | None = None
    "device-to-host copies of the decode loop: one a round, and one per adaptive draft step"
    rejected: list[list[str]] | None = None
    "text of the drafted tokens that were not accepted, one list per verify pass, only in round 0"
    memory: Memory | None = None
    energy_joules: float | None = None
    device_before: DeviceState | None = None
    device_after: DeviceState | None = None

    @property
    def key(self) -> tuple[str, int, str, int]:
        return (self.cell.id, self.round, self.prompt_id, self.turn)

    @property
    def adds_up(self) -> bool:
        """Whether what was counted in each pass is of as many passes, and makes the text."""
        each = (self.committed, self.drafted, self.drafted_depth, self.accepted, self.round_seconds)
        passes = {len(counts) for counts in each if counts is not None}
        return len(passes) < 2 and (not self.committed or 1 + sum(self.committed) == len(self.new_tokens or ()))


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What a drafter cost to make, from its checkpoint's metadata."""

    method: str
    drafter: str
    "file name"
    device: str
    tokens_seen: int
    data_tokens: int
    steps: int
    seconds: float
    "method's own share of the training steps"
    shared_seconds: float
    "target's forward passes, paid once for all methods trained together"
    data_seconds: float
    "writing the training text with the target"
    flops: float
    peak_allocated_bytes: int | None = None
    parameters: int
    file_bytes: int
    held_out_tau: float | None = None


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """How far a target is from the base weights at 32 bits, on held-out text."""

    weights: str
    bits: str
    dtype: str
    positions: int
    perplexity: float
    reference_bits: str
    "32; 16 for a base that does not fit in 32"
    reference_perplexity: float
    agreement: float
    "share of positions where both put the same token first"


class Roofline(msgspec.Struct, frozen=True, kw_only=True):
    """What a device did at best, measured."""

    device_name: str
    device_uuid: str | None = None
    torch: str
    measured: str
    "ISO 8601, UTC"
    buffer_bytes: int
    copy_bytes_per_second: float
    "read and written together"
    read_bytes_per_second: float
    matrix_flops: dict[str, float] = {}
    "operations a second of a square matrix product, by dtype"


class Manifest(msgspec.Struct, kw_only=True):
    """What was planned, where it ran, and how. Everything a reader needs to judge or repeat the run."""

    schema: int = SCHEMA
    run: str
    created: str
    "ISO 8601, UTC"
    command: list[str]
    model: str
    weights_sha256: str | None = None
    prompt_set: str
    prompt_set_sha256: str
    prompts: int
    turns: int
    first_answers_sha256: str | None = None
    cells: list[Cell]
    rounds: int
    seed: int
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int
    system: str | None = None
    raw: bool = False
    precision: float | None = None
    "`--rounds auto`: how narrow every speed-up's interval was to be; `rounds` is then how many it came to"
    time_budget_seconds: float | None = None
    isolation: str = "round"
    executor: str = "local"
    synthetic: bool = False
    "as in each trial: a run is synthetic as a whole or not at all"
    device_map: str | None = None
    "how the target was spread over several devices"
    vram_budget_bytes: int | None = None
    "what each cell's allocator was allowed (on a CPU: the resident set that it was held against)"
    acceptance: str | None = None
    "where drawn acceptance comes from, as the user wrote it"
    preliminary: bool = False
    "true when the defaults chose a small subset: good for a first look, not for publishing"
    host: dict[str, Any] = {}
    versions: dict[str, str] = {}
    training: list[Training] = []
    drafters: dict[str, str] | None = None
    "SHA-256 of each cell's drafter, by the cell's id; None in runs that did not record it"
    quality: list[Quality] = []
    "of every target that is not the base weights at 32 bits"
    roofline: Roofline | None = None
    "of the device that the cells run on, where it is known"
    warnings: list[str] = []
    "sentences: what keeps the figures from saying more, or from being trusted"


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A place where a method's answer parts from its baseline's, scored again in float64."""

    cell: str
    prompt_id: str
    turn: int
    position: int
    "index into the new tokens"
    margin: float | None
    "how far the worse token is below the best logit; None where one text ends here"

    @property
    def key(self) -> tuple[str, str, int, int]:
        return (self.cell, self.prompt_id, self.turn, self.position)


@dataclass(frozen=True)
class Run:
    """A run directory, read."""

    directory: Path
    manifest: Manifest
    rows: tuple[Trial, ...]
    skipped_lines: int
    "lines that could not be read (a file cut off in the middle of a line)"
    judged: tuple[Judged, ...] = ()
    "of `judged.jsonl`: what float64 says of texts that differ"

    @property
    def measured_rounds(self) -> int:
        """Rounds with trials; those that were planned where there is none."""
        return len({trial.round for trial in self.rows}) or self.manifest.rounds

    @property
    def planned_trials(self) -> int:
        """As far as the run's own rows tell its turns."""
        turns = max(len({(trial.prompt_id, trial.turn) for trial in self.rows}), self.manifest.prompts)
        return turns * max(self.manifest.rounds, self.measured_rounds) * len(self.manifest.cells)

    @property
    def missing_trials(self) -> int:
        """How many of those that were planned have no row."""
        return max(0, self.planned_trials - len({trial.key for trial in self.rows}))

    def __hash__(self) -> int:
        """Cheap, so that what is derived from a run can be kept for the next who asks."""
        return hash((self.directory, self.manifest.run, len(self.rows)))


def append_trial(path: Path, trial: Trial) -> None:
    """Append one line to a run's trials, durably."""
    append_line(path, trial)


def append_line(path: Path, value: msgspec.Struct) -> None:
    """Append a JSON line and make it durable before returning: a killed run loses nothing that was finished.

    What a killed writer left of its last line becomes a line of its own, which readers skip.
    """
    with path.open("a+b") as file:
        torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + msgspec.json.encode(value) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def refuse_mixture(*runs: Run) -> None:
    """Raises UserError where synthetic and real trials would be compared or put into one table."""
    kinds = {trial.synthetic for run in runs for trial in run.rows}
    if len(kinds) > 1:
        names = ", ".join(str(run.directory) for run in runs)
        raise UserError(f"{names}: SYNTHETIC trials and real ones are never put together: read them apart")


def read_trials(path: Path) -> Iterator[tuple[Trial, dict[str, Any]] | None]:
    """Each line as (typed, raw dict); None for a line that is not a trial."""
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        trial = _trial(line)
        yield None if trial is None else (trial, msgspec.json.decode(line))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace `manifest.json` atomically. What a newer program wrote into it, and we do not know, stays."""
    path, partial = directory / "manifest.json", directory / "manifest.json.partial"
    fields = msgspec.to_builtins(manifest)
    unknown = {key: value for key, value in _object(path).items() if key not in fields}
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(fields | unknown), indent=2))
    os.replace(partial, path)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_run(directory: Path | str) -> Run:
    """Read a run directory. Raises UserError where it is not one or was written by a newer schema."""
    directory = Path(directory)
    manifest_path = directory / "manifest.json"
    if not manifest_path.is_file():
        raise UserError(f"{directory} is not a run: it has no manifest.json; `python -m harness run` makes one")
    try:
        raw = json.loads(manifest_path.read_bytes())
        if not isinstance(raw, dict) or type(raw.get("schema", 0)) is not int:
            raise UserError(f"{manifest_path} is no manifest of a run: `python -m harness run` writes one")
        if raw.get("schema", 0) > SCHEMA:
            raise UserError(f"{manifest_path} has schema {raw['schema']}, newer than {SCHEMA}: update the harness")
        manifest = msgspec.convert(raw, Manifest)
    except (ValueError, msgspec.ValidationError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{manifest_path} cannot be read: {error}") from error
    path = directory / "trials.jsonl"
    good, skipped = _good_lines(path) if path.is_file() else ((), 0)
    return Run(directory, manifest, good, skipped, tuple(_judged(directory / "judged.jsonl")))


def _judged(path: Path) -> Iterator[Judged]:
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(*UNREADABLE):  # torn, and so judged again
            yield msgspec.json.decode(line, type=Judged)


def read_runs(path: Path | str) -> list[Run]:
    """The runs that a path names: a run, a directory of runs, or a file of trials. Raises UserError for none.

    A file of trials in a run's directory is that run; elsewhere its manifest says what the trials do, and no host.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return [read_run(path)]
    if path.is_dir():
        found = [read_run(each.parent) for each in sorted(path.glob("*/manifest.json"))]
        if not found:
            raise UserError(f"{path} holds no run: give a run, a directory of runs, or a trials.jsonl")
        return found
    if not path.is_file():
        raise UserError(f"no {path}: give a run, a directory of runs, or a trials.jsonl")
    if path.name == "trials.jsonl" and path.with_name("manifest.json").is_file():
        return [read_run(path.parent)]
    good, skipped = _good_lines(path)
    if not good:
        raise UserError(f"{path} holds no trial: give a run, a directory of runs, or a trials.jsonl")
    return [Run(path.parent, _manifest_of(good), good, skipped)]


def _good_lines(path: Path) -> tuple[tuple[Trial, ...], int]:
    """Trials, and how many lines are none. Raises UserError for those of a newer schema."""
    rows = list(_typed(path))
    good = tuple(row for row in rows if row is not None)
    newest = max((trial.schema for trial in good), default=SCHEMA)
    if newest > SCHEMA:
        raise UserError(f"{path} has schema {newest}, newer than {SCHEMA}: update the harness")
    return good, len(rows) - len(good)


def _manifest_of(trials: Sequence[Trial]) -> Manifest:
    """What trials tell of the run that they are from."""
    first = trials[0]
    return Manifest(
        schema=first.schema,
        run=first.run,
        created="",
        command=[],
        model=first.cell.model,
        prompt_set=first.prompt_set,
        prompt_set_sha256="",
        prompts=len({trial.prompt_id for trial in trials}),
        turns=1 + max(trial.turn for trial in trials),
        cells=list({trial.cell.id: trial.cell for trial in trials}.values()),
        rounds=1 + max(trial.round for trial in trials),
        seed=first.seed,
        temperature=first.temperature,
        top_p=first.top_p,
        max_new_tokens=first.max_new_tokens or 0,
    )


def _typed(path: Path) -> Iterator[Trial | None]:
    """`read_trials` without the raw dicts: of a hundred thousand lines they would fill the memory."""
    with path.open("rb") as file:
        yield from map(_trial, filter(bytes.strip, file))


_DECODER = msgspec.json.Decoder(Trial)


def _trial(line: bytes) -> Trial | None:
    """None for what is no trial, or none that could have been measured."""
    try:
        trial = _DECODER.decode(line)
    except UNREADABLE:
        return None
    return trial if trial.adds_up else None
