"""transformers' own `generate` beside a run: what a user would call instead, with its static cache and its own compile.

    python -m benchmarks.generate out/RUN --limit 8

Greedy, over the first turns of the run's prompts, with the run's model, bits and limits, and end to end: prefill
counts, as it does for the run's decoders beside it. Two calls before the first that counts pay for compiling, and are
told apart. Writes `generate.json` into the run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter

from harness.results import BASELINE, Run, read_run

app = App(name="python -m benchmarks.generate", help=__doc__)


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
    warm_up_seconds: float
    answers: list[Answer] = []

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.new_tokens for answer in self.answers) / sum(answer.seconds for answer in self.answers)


@app.default
def generate(
    directory: Annotated[Path, Parameter(help="A finished run.")], /, *, limit: int = 8, cache: str = "static"
) -> None:
    """Decode the run's first turns by transformers alone, and say how fast the run's decoders were on the same ones."""
    import torch

    from harness import chat, dialogue, host, weights
    from harness.worker import exact_float32

    run = read_run(directory)
    first = next(trial.cell for trial in run.rows if trial.cell.method == BASELINE)
    mine = {trial.prompt_id: trial for trial in run.rows if trial.cell == first and trial.turn == trial.round == 0}
    said = prompts_of(run)
    exact_float32()
    loaded = weights.load(
        weights.resolve(first.model), weights.Bits.parse(first.bits), device=first.device, dtype=first.dtype
    )
    loaded.model.set_attn_implementation("sdpa")
    ends = sorted(chat.end_ids(loaded.model, loaded.tokenizer))
    most = run.manifest.max_new_tokens
    ids = {
        name: dialogue.encode(loaded.tokenizer, said[name][:1], [], system=run.manifest.system, raw=run.manifest.raw)
        for name in list(mine)[:limit]
    }
    room = max(map(len, ids.values())) + most

    kept: Any = None
    if cache == "static":
        from transformers import StaticCache

        kept = StaticCache(config=loaded.model.config, max_cache_len=room)

    def once(prompt: list[int]) -> tuple[list[int], float]:
        ids_1T = torch.tensor([prompt], device=first.device)
        how: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": ends[0], "max_new_tokens": most}
        if cache == "static":
            how["past_key_values"] = kept
            kept.reset()
        started = perf_counter()
        out_1T = loaded.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, **how)
        new = out_1T[0, len(prompt) :].tolist()  # waits for the device
        return new, perf_counter() - started

    warm_up = sum(once(next(iter(ids.values())))[1] for _ in range(2))
    found = Generate(
        model=first.model,
        bits=first.bits,
        cache=cache,
        device=torch.cuda.get_device_name() if first.device.startswith("cuda") else first.device,
        versions=host.versions(),
        warm_up_seconds=warm_up,
    )
    for name, prompt in ids.items():
        new, seconds = once(prompt)
        same = new == mine[name].new_tokens
        found.answers.append(Answer(prompt_id=name, new_tokens=len(new), seconds=seconds, identical=same))
        (directory / "generate.json").write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    print(f"transformers' generate, {cache} cache: {found.tokens_per_second:,.0f} tok/s end to end, ", end="")
    print(f"{len(found.answers)} answers, {warm_up:.0f} s of warming up and compiling before")
    for label, runtime, speed in beside(run, set(ids)):
        print(f"{label} ({runtime}): {speed:,.0f} tok/s end to end")


def prompts_of(run: Run) -> dict[str, tuple[str, ...]]:
    """By id, as the run's prompt set has them. Raises UserError where there is no such set any more."""
    import prompts

    return {prompt.id: prompt.turns for prompt in prompts.load(run.manifest.prompt_set).prompts}


def beside(run: Run, names: set[str]) -> list[tuple[str, str, float]]:
    """Label, runtime and end-to-end speed of the run's cells over the first turns of these prompts."""
    found = []
    for cell in run.manifest.cells:
        told = [trial for trial in run.rows if trial.cell == cell and trial.turn == 0 and trial.prompt_id in names]
        seconds = sum((trial.prefill_seconds or 0.0) + (trial.decode_seconds or 0.0) for trial in told)
        if seconds:
            found.append((cell.label, cell.runtime, sum(len(trial.new_tokens or ()) for trial in told) / seconds))
    return found


if __name__ == "__main__":
    sys.exit(app())
