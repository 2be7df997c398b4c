"""transformers' own `generate` beside a run: what a user would call instead, with its static cache and its own compile.

    python -m benchmarks.generate out/RUN --limit 8

Greedy, over the first turns of the run's prompts, with the run's model, bits and limits, and end to end: prefill
counts, as it does for the run's decoders beside it. Each prompt is decoded once before it counts, so that compiling and
whatever a new length costs is over; for the decoders, their last round. Writes `generate.json` into the run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import App, Parameter

from harness.errors import UserError
from harness.results import BASELINE, Run, Trial, read_run

app = App(name="python -m benchmarks.generate", help=__doc__, result_action="return_value")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    prompt_id: str
    new_tokens: int
    seconds: float
    identical: bool
    "to the run's own baseline"


class Generate(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    bits: str
    cache: str
    device: str
    versions: dict[str, str]
    first_calls_seconds: float
    "of every prompt's first decoding, compiling included"
    answers: list[Answer]

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.new_tokens for answer in self.answers) / sum(answer.seconds for answer in self.answers)


@app.default
def generate(
    directory: Annotated[Path, Parameter(help="A finished run.")],
    /,
    *,
    limit: int = 8,
    cache: Literal["static", "dynamic"] = "static",
) -> None:
    """Decode the run's first turns by transformers alone, and say how fast the run's decoders were on the same ones."""
    run = read_run(directory)
    first = first_answers(run)[:limit]
    found = measured(run, first, cache)
    (directory / "generate.json").write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    same = sum(answer.identical for answer in found.answers)
    print(f"transformers' generate, {cache} cache: {found.tokens_per_second:,.0f} tok/s end to end")
    print(f"{len(found.answers)} answers, {same} of them the baseline's; {found.first_calls_seconds:.0f} s before")
    for label, runtime, speed in beside(run, {trial.prompt_id for trial in first}):
        print(f"{label} ({runtime}): {speed:,.0f} tok/s end to end")


def measured(run: Run, first: Sequence[Trial], cache: str) -> Generate:
    """transformers' answers to the first turns that the baseline answered. Raises UserError."""
    import torch
    from transformers import StaticCache

    import prompts
    from harness import chat, dialogue, host, meters, weights
    from harness.target import Target
    from harness.worker import exact_float32

    cell, m = first[0].cell, run.manifest
    said = {prompt.id: prompt.turns for prompt in prompts.load(m.prompt_set).prompts}
    exact_float32()
    loaded = weights.load(
        weights.resolve(cell.model), weights.Bits.parse(cell.bits), device=cell.device, dtype=cell.dtype
    )
    target, ends = Target(loaded.model, capacity=1), chat.end_ids(loaded.model, loaded.tokenizer)
    ids = [
        dialogue.encode(loaded.tokenizer, said[trial.prompt_id][:1], [], system=m.system, raw=m.raw) for trial in first
    ]
    room = max(map(len, ids)) + m.max_new_tokens
    kept: Any = StaticCache(config=loaded.model.config, max_cache_len=room) if cache == "static" else None

    @torch.inference_mode()
    def once(prompt: list[int]) -> tuple[list[int], float]:
        if kept is not None:
            kept.reset()
        started = perf_counter()
        new = target.generate(prompt, m.max_new_tokens, ends, kept)
        return new, perf_counter() - started

    before = sum(once(prompt)[1] for prompt in ids)
    answers = []
    for trial, prompt in zip(first, ids, strict=True):
        new, seconds = once(prompt)
        same = new == trial.new_tokens
        answers.append(Answer(prompt_id=trial.prompt_id, new_tokens=len(new), seconds=seconds, identical=same))
    return Generate(
        model=cell.model,
        bits=cell.bits,
        cache=cache,
        device=meters.device_name(target.device),
        versions=host.versions(),
        first_calls_seconds=before,
        answers=answers,
    )


def first_answers(run: Run) -> list[Trial]:
    """The first baseline's answers to first turns, one a prompt. Raises UserError where there is nothing to compare."""
    if run.manifest.synthetic:
        raise UserError("this run is SYNTHETIC: its texts mean nothing, and transformers would write others")
    if run.manifest.temperature > 0:
        raise UserError("this run sampled: only greedy texts are set beside transformers' generate")
    found: dict[tuple[str, str], Trial] = {}
    for trial in run.rows:
        if trial.cell.method == BASELINE and trial.turn == 0 and trial.outcome == "ok" and trial.cell.context is None:
            found.setdefault((trial.cell.id, trial.prompt_id), trial)
    cells = dict.fromkeys(cell for cell, _ in found)
    if not cells:
        raise UserError("this run has no answer of `ar` to a prompt as it stands: nothing to set generate beside")
    return [trial for (cell, _), trial in found.items() if cell == next(iter(cells))]


def beside(run: Run, names: set[str]) -> list[tuple[str, str, float]]:
    """Label, runtime and end-to-end speed over the first turns of these prompts, in the last round with all of them."""
    found = []
    for cell in run.manifest.cells:
        rounds: dict[int, dict[str, Trial]] = {}
        for trial in run.rows:
            if trial.cell.id == cell.id and trial.turn == 0 and trial.outcome == "ok" and trial.prompt_id in names:
                rounds.setdefault(trial.round, {})[trial.prompt_id] = trial
        whole = [number for number, trials in rounds.items() if trials.keys() == names]
        if whole:
            trials = rounds[max(whole)].values()
            seconds = sum((trial.prefill_seconds or 0.0) + (trial.decode_seconds or 0.0) for trial in trials)
            tokens = sum(len(trial.new_tokens or ()) for trial in trials)
            found.append((cell.label, cell.runtime, tokens / seconds))
    return found


def main() -> int:
    try:
        app()
    except UserError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
