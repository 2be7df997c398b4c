"""Cells and rounds in a process of their own, one unless the user wants more: `python -m harness.worker JOB.json..`.

Loads, warms up, decodes every prompt that the result file does not have yet, and appends each trial at once. Whatever
goes wrong becomes a row with its reason; a process that was killed leaves that to the parent.
"""

from __future__ import annotations

import gc
import hashlib
import math
import re
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from harness import chat, child, dialogue, meters, method, roofline, shapes, weights
from harness import runtime as runtimes
from harness.decode import Limits, decode
from harness.drawn import DrawnVerdicts
from harness.errors import UserError
from harness.joined import apart
from harness.method import Method
from harness.plan import Job, Plan, Turn
from harness.results import Outcome, append_trial, read_trials
from harness.runtime import CaptureError
from harness.sampling import Sampler
from harness.target import Target
from harness.watched import Watched
from harness.weights import Bits, LoadedModel

WARM_UP_TOKENS = 8
WARM_UP_PASSES = 6
"at most"
SETTLED = 0.9
"a warm-up goes on while its median step takes less than this share of the one before"
POISONED = "not measured, for a capture had failed before in this process"
SPARE_SLOTS = 64
"""Cache slots beyond the longest text, the same for every method whose rounds fit, so that caches are alike."""


def main() -> None:
    emit = child.to_parent()
    bench: Bench | None = None
    for place, path in enumerate(sys.argv[1:]):
        job = msgspec.json.decode(Path(path).read_bytes(), type=Job)
        plan = msgspec.json.decode(Path(job.plan).read_bytes(), type=Plan)
        if place:
            emit(started(job, plan))
        loaded = None
        if place and (bench is None or bench.job.cell != job.cell):  # None where the cell before could not be set up
            loaded, joined = (None, False) if bench is None else (bench.lend(job), bench.target.runtime.joins)
            bench = None
            free()
            if loaded is not None and joined:  # only now: what joined the weights holds them
                apart(loaded.model)
        try:
            bench = work(job, plan, emit, bench, loaded)
        except CaptureError as error:
            for later in (msgspec.json.decode(Path(path).read_bytes(), type=Job) for path in sys.argv[place + 2 :]):
                fail(later, plan, missing(later, plan), "killed", f"{POISONED}: {error}", emit)
            return


def started(job: Job, plan: Plan) -> child.Started:
    cell = plan.cells[job.cell].cell
    return child.Started(cell.label, cell.bits, job.round, job.order, len(missing(job, plan)))


def free() -> None:
    """Give back what a cell held, as far as a process can."""
    gc.collect()
    torch.compiler.reset()
    meters.forget_peak_rss()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # kept for every stream that ran a product, 32 MiB each on a Hopper card
        torch.cuda.empty_cache()


def work(
    job: Job, plan: Plan, emit: child.Emit, bench: Bench | None = None, loaded: LoadedModel | None = None
) -> Bench | None:
    """Measure what is missing of a job; what can do the next round of its cell.

    `bench` has this cell from an earlier round, `loaded` its target from another cell. Raises CaptureError, with a row
    for every turn, where the process can measure no more.
    """
    turns = missing(job, plan)
    try:
        bench = set_up(job, plan, loaded) if bench is None else replace(bench, job=job)
    except Exception as error:
        fail(job, plan, turns, *diagnose(error), emit)
        if isinstance(error, CaptureError):
            raise
        return None
    for index, turn in enumerate(turns):
        try:
            measured = bench.trial(turn)
        except Exception as error:
            outcome, reason = diagnose(error)
            fail(job, plan, [turn], outcome, reason, emit)
            if isinstance(error, CaptureError):
                fail(job, plan, turns[index + 1 :], outcome, f"{POISONED}: {reason}", emit)
                raise
        else:
            append_trial(Path(job.trials), job.row(plan, turn, "ok", **measured))
            emit(child.Decoded("ok", 1, len(measured["new_tokens"]) - 1, measured["decode_seconds"]))
    return bench


def fail(job: Job, plan: Plan, turns: Sequence[Turn], outcome: Outcome, reason: str, emit: child.Emit) -> None:
    """Rows for turns that could not be measured."""
    for turn in turns:
        append_trial(Path(job.trials), job.row(plan, turn, outcome, reason=reason))
    emit(child.Decoded(outcome, len(turns), reason=reason))


def missing(job: Job, plan: Plan) -> list[Turn]:
    """Turns of this cell and round that have no row; one that was killed is measured again."""
    trials = Path(job.trials)
    rows = [row[0] for row in read_trials(trials) if row is not None] if trials.is_file() else []
    done = {row.key for row in rows if row.outcome != "killed"}
    cell = plan.cells[job.cell].cell
    return [turn for turn in plan.turns() if (cell.id, job.round, turn.prompt.id, turn.index) not in done]


def diagnose(error: Exception) -> tuple[Outcome, str]:
    """What a failure is called, and its reason in the row."""
    if isinstance(error, CaptureError) and isinstance(error.__cause__, Exception):
        return diagnose(error.__cause__)
    text = str(error).strip()
    if isinstance(error, UserError):
        return "unsupported", text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return "oom", _brief(text.partition("\n")[0]) or "out of memory"
    if isinstance(error, torch.AcceleratorError):
        text = text.partition("\n")[0]  # what follows is how to debug CUDA
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return "error", f"{type(error).__name__}: {text} (at {where})"


def _brief(said: str) -> str:
    """Of all that CUDA's allocator says under a budget: what was asked for and what was allowed."""
    tried, gpu, rest = said.partition(" GPU ")
    allowed = re.search(r"[\d.]+ [KMGT]iB allowed", rest)
    return f"{tried} {allowed[0]}." if gpu and allowed else said


# --- one cell, loaded ------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A loaded target and its method, ready to decode."""

    job: Job
    plan: Plan
    loaded: LoadedModel
    target: Target
    method: Method
    sampler: Sampler
    prompts: dict[tuple[str, int], list[int]]
    gauges: meters.Gauges
    program_bytes: int
    load_bytes: int | None
    rounding_bytes: int | None
    limits: Limits
    redraw: DrawnVerdicts | None

    passes: int = 0
    settled: bool = False

    def warm_up(self) -> None:
        """Decode a short text until its steps get no faster, or WARM_UP_PASSES times."""
        first = next(iter(self.prompts.values()))
        limits = Limits(min(WARM_UP_TOKENS, self.limits.max_new_tokens))
        before = math.inf
        while not self.settled and self.passes < WARM_UP_PASSES:
            rounds = decode(self.target, self.method, first, limits, self.sampler, self.redraw)
            _, reading = meters.measure(rounds, self.gauges)
            now = statistics.median(reading.round_seconds or [0.0])
            self.settled, before = now >= SETTLED * before, now
            self.passes += 1

    def trial(self, turn: Turn) -> dict[str, Any]:
        """Decode one turn; the measured fields of its row.

        A text in which something had to be captured first is decoded again: a capture happens once, however long it
        took.
        """
        prompt, runtime = self.prompts[turn.prompt.id, turn.index], self.target.runtime
        while True:
            captured = runtime.captures
            self._seed(turn)
            started, clock = time.time(), meters.clock(self.target.device)
            watched = Watched(self.method) if self.job.round == 0 else None
            method: Any = watched or self.method
            rounds = decode(self.target, method, prompt, self.limits, self.sampler, self.redraw, clock)
            (prefill, *steps), reading = meters.measure(rounds, self.gauges)
            if runtime.captures == captured:
                break
        self.refuse_beyond_budget()
        new_tokens = [token for step in (prefill, *steps) for token in step.committed]
        memory = msgspec.structs.replace(
            reading.memory,
            load_bytes=self.load_bytes,
            rounding_bytes=self.rounding_bytes,
            weights_bytes=self.loaded.weight_bytes,
            drafter_bytes=self.method.drafter_bytes,
            cache_bytes=self.target.cache.bytes,
            graphs_bytes=runtime.captured_bytes,
            program_bytes=self.program_bytes,
        )
        return {
            "lossless": self.method.lossless,
            "device_name": meters.device_name(self.target.device),
            "device_uuid": meters.uuid(self.target.device),
            "started_unix_seconds": started,
            "prompt_tokens": len(prompt),
            "warm_up_passes": self.passes,
            "warm_up_settled": self.settled,
            "new_tokens": new_tokens,
            **self._texts(new_tokens, watched.rejected(steps) if watched else None),
            "prefill_seconds": reading.prefill_seconds,
            "decode_seconds": reading.decode_seconds,
            "round_seconds": reading.round_seconds,
            "drafted": [step.drafted for step in steps],
            "drafted_depth": [step.drafted_depth for step in steps],
            "accepted": [step.accepted for step in steps],
            "committed": [len(step.committed) for step in steps],
            "phase_seconds": clock.seconds(),
            "captures": runtime.captures,
            "capture_seconds": runtime.capture_seconds,
            "pass_bytes": roofline.pass_bytes(
                self.target, self.loaded.weight_bytes, len(prompt) + len(new_tokens) // 2
            ),
            "host_syncs": sum(step.host_syncs for step in steps),
            "memory": memory,
            "energy_joules": reading.energy_joules,
            "device_before": reading.before,
            "device_after": reading.after,
            "drawn_acceptance": None if self.redraw is None else self.redraw.chances,
        }

    def lend(self, job: Job) -> LoadedModel | None:
        """The target for another cell, where that wants the same."""
        cell, other = (self.plan.cells[each.cell].cell for each in (self.job, job))
        same = job.source == self.job.source and (cell.bits, cell.dtype) == (other.bits, other.dtype)
        return self.loaded if same else None

    def _seed(self, turn: Turn) -> None:
        assert self.sampler.generator is not None
        seed = seed_of(self.plan.seed, turn)
        self.sampler.generator.manual_seed(seed)
        if self.redraw is not None:
            self.redraw.seed(seed)

    def refuse_beyond_budget(self) -> None:
        """Raises MemoryError where the run has a budget, and this device no means to enforce it."""
        if self.plan.vram_budget_bytes is not None:
            self.gauges.refuse_beyond(self.plan.vram_budget_bytes)

    def _texts(self, new_tokens: list[int], rejected: list[list[int]] | None) -> dict[str, Any]:
        """Nothing for a model without a tokenizer."""
        tokenizer = self.loaded.tokenizer
        if tokenizer is None:
            return {}
        told = {token: dialogue.decode(tokenizer, [token]) for tokens in rejected or () for token in tokens}
        return {
            "text": dialogue.decode(tokenizer, new_tokens),
            "token_texts": dialogue.pieces(tokenizer, new_tokens) if self.job.round == 0 else None,
            "rejected": None if rejected is None else [[told[token] for token in tokens] for tokens in rejected],
        }


def seed_of(seed: int, turn: Turn) -> int:
    """The same in every cell and round, so that what is drawn differs by method only."""
    text = f"{seed}/{turn.prompt.id}/{turn.index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def set_up(job: Job, plan: Plan, loaded: LoadedModel | None = None) -> Bench:
    """Load and warm up; `loaded` is the cell's target where the process has it."""
    exact_float32()
    torch.manual_seed(plan.seed)
    program_bytes = meters.program_bytes()
    planned = plan.cells[job.cell]
    cell = planned.cell
    if plan.vram_budget_bytes is not None:
        meters.cap(torch.device(cell.device), plan.vram_budget_bytes, everywhere=plan.device_map is not None)
    loaded = loaded or weights.load(
        job.source,
        Bits.parse(cell.bits),
        device=cell.device,
        dtype=cell.dtype,
        device_map=plan.device_map,
        trust_remote_code=plan.trust_remote_code,
    )
    answers = msgspec.json.decode(Path(job.first_answers).read_bytes(), type=dict[str, list[str]])
    prompts = encoded(plan, loaded, answers, cell.context)
    sampler = Sampler(plan.temperature, plan.top_p, torch.Generator(cell.device))
    room = max(map(len, prompts.values())) + plan.max_new_tokens
    spec = method.Spec(cell.method, cell.options, cell.label)
    drafter = None if planned.drafter is None else Path(planned.drafter)
    try:
        target, decoder = seat(loaded.model, spec, drafter, sampler, room, cell.runtime)
    except ValueError as error:  # a method or the target refuses what the user asked for, and says why
        raise UserError(str(error)) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # where weights lay before they were joined
    gauges = meters.gauges(target.device, target.trunk.devices)
    # Random weights say nothing, and so never that a text is over.
    ends = frozenset[int]() if loaded.tokenizer is None else chat.end_ids(loaded.model, loaded.tokenizer)
    limits, held = Limits(plan.max_new_tokens, ends), (gauges.allocated_bytes(), gauges.rounding_bytes())
    profile = planned.profile
    redraw = None if profile is None else DrawnVerdicts(profile, plan.max_new_tokens, target.device)
    bench = Bench(job, plan, loaded, target, decoder, sampler, prompts, gauges, program_bytes, *held, limits, redraw)
    bench.warm_up()
    bench.refuse_beyond_budget()
    return bench


def seat(
    model: Any,
    spec: method.Spec,
    drafter: Path | None,
    sampler: Sampler,
    room: int,
    runtime: str = "eager",
) -> tuple[Target, Method]:
    """The method on a target that gives its taps, with a cache for `room` tokens and what a round reaches beyond."""
    kind, options = method.find(spec.name), method.options_of(spec)
    spare = SPARE_SLOTS
    while True:
        launching = runtimes.make(runtime, model.device, sampler.generator)
        target = Target(model, capacity=room + spare, scratch=spare, runtime=launching)
        decoder = kind.load(target, options, drafter, sampler)
        if decoder.reach <= spare:
            target.tap(decoder.taps)
            return target, decoder
        spare = decoder.reach
        del target, decoder  # before their successors are made


def encoded(
    plan: Plan, loaded: LoadedModel, answers: dict[str, list[str]], context: int | None
) -> dict[tuple[str, int], list[int]]:
    """Token ids of every turn, after the first answers that all cells share; `context` of them where it is not None.

    What stands before a shorter prompt is the text of the others. A shape's are random.
    """
    if loaded.tokenizer is None:
        assert context is not None, "the plan gives every cell of a shape its context"
        vocabulary = loaded.model.config.vocab_size
        return {
            (turn.prompt.id, turn.index): shapes.random_ids(turn.prompt.id, context, vocabulary)
            for turn in plan.turns()
        }
    ids = {}
    for turn in plan.turns():
        own = dialogue.encode(
            loaded.tokenizer,
            turn.prompt.turns[: turn.index + 1],
            answers.get(turn.prompt.id, [])[: turn.index],
            system=plan.system,
            raw=plan.raw,
        )
        if context is not None:
            every = plan.prompt_set.prompts
            others = [prompt.turns[0] for prompt in every if prompt is not turn.prompt] or list(turn.prompt.turns)
            own = dialogue.padded(loaded.tokenizer, own, others, context)
        ids[turn.prompt.id, turn.index] = own
    return ids


def exact_float32() -> None:
    """No TF32: at 32 bits a draft must not be rejected, nor a text differ, by a matrix unit's shortcut."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


if __name__ == "__main__":
    main()
