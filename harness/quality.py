"""How far a changed target is from its weights at 32 bits: `python -m harness.quality JOB.json`.

Fewer bits, or a drafter merged into the weights, make another model: faster, perhaps, but not the same. For each such
target of a plan: perplexity of held-out text, and how often its next token is the one of the base weights at 32 bits.
The text is what our own standard prompts ask, the longest of them, which nothing here was trained on.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from harness import child, weights
from harness.errors import UserError
from harness.paths import cache_dir, write_atomically
from harness.plan import Plan, RunJob
from harness.prepare import load_precisely
from harness.results import Cell, Quality, read_run, write_manifest
from harness.weights import Bits, LoadedModel, ModelSource
from harness.worker import diagnose, exact_float32
from prompts import load

TEXTS = 12
LONGEST = 256
"tokens of a text that are scored at most"
MOST_LOSS = 700.0
"a token's: beyond it no number is its exponential"


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """What one model says of the text, position by position."""

    loss: float
    "sum of -log p of the next token, natural"
    best: list[int]
    "the likeliest next token at every position"

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / len(self.best))


def changed(plan: Plan) -> list[Cell]:
    """One runnable cell of every target that is not the base at 32 bits."""
    if plan.model.kind == "shape":  # random weights are as good as any others
        return []
    found: dict[tuple[str, ...], Cell] = {}
    for one in plan.cells:
        if one.unsupported is None and (one.cell.bits != "32" or one.cell.weights != "base"):
            found.setdefault((one.cell.weights, one.cell.bits, one.cell.dtype), one.cell)
    return list(found.values())


def main() -> None:
    emit = child.to_parent()
    measure(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=RunJob), emit)


def measure(job: RunJob, emit: child.Emit) -> None:
    """Write what is found into the manifest. A target that cannot be scored is left out with a warning."""
    directory = Path(job.directory)
    plan = msgspec.json.decode((directory / "plan.json").read_bytes(), type=Plan)
    exact_float32()
    emit(child.Preparing("scoring held-out text with the base weights"))
    base = load_precisely(plan)
    texts = held_out(base.tokenizer)
    reference = cached(base, texts)
    found = []
    for cell in changed(plan):
        emit(child.Preparing(f"scoring held-out text in {cell.bits} bits, weights {cell.weights}"))
        try:
            scored = cached(_target(cell, plan, job.sources), texts)
        except Exception as error:
            outcome, reason = diagnose(error)
            emit(child.Warned(f"no perplexity in {cell.bits}, weights {cell.weights}: {outcome}: {reason}"))
            continue
        found.append(compared(cell, scored, reference, base.bits.id))
    manifest = read_run(directory).manifest
    manifest.quality = found
    write_manifest(directory, manifest)


def _target(cell: Cell, plan: Plan, sources: dict[str, ModelSource]) -> LoadedModel:
    return weights.load(
        sources.get(cell.weights, plan.model),
        Bits.parse(cell.bits),
        device=cell.device,
        dtype=cell.dtype,
        device_map=plan.device_map,
        trust_remote_code=plan.trust_remote_code,
    )


def held_out(tokenizer: Any) -> list[list[int]]:
    """Ids of the longest first turns of the standard prompts, without a chat template."""
    turns = sorted((prompt.turns[0] for prompt in load("standard").prompts), key=len, reverse=True)[:TEXTS]
    return [list(tokenizer(turn, add_special_tokens=False).input_ids)[:LONGEST] for turn in turns]


def cached(loaded: LoadedModel, texts: Sequence[Sequence[int]]) -> Scored:
    """Scored once for these weights, bits, dtype, kind of device and texts."""
    model = loaded.model
    identity = [loaded.sha256, loaded.bits.id, str(model.dtype), model.device.type, str(torch.__version__), list(texts)]
    key = hashlib.sha256(msgspec.json.encode(identity)).hexdigest()
    path = cache_dir() / "quality" / f"{key}.json"
    if path.is_file():
        return msgspec.json.decode(path.read_bytes(), type=Scored)
    scored = score(lambda ids_1T: model(ids_1T, use_cache=False).logits[0], texts, model.device)
    write_atomically(path, msgspec.json.encode(scored))
    return scored


@torch.inference_mode()
def score(
    logits: Callable[[torch.Tensor], torch.Tensor], texts: Sequence[Sequence[int]], device: torch.device
) -> Scored:
    """`logits` gives (T, V) for ids (1, T); the first token of a text is given, not scored."""
    loss, best = 0.0, []
    for text in texts:
        ids_T = torch.tensor(list(text), device=device)
        logits_TV = logits(ids_T[None])[:-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="sum"))
        best += logits_TV.argmax(-1).tolist()
    if not loss < MOST_LOSS * len(best):  # nor where it is no number
        raise UserError(f"a loss of {loss / len(best):.3g} a token on held-out text gives no perplexity")
    return Scored(loss=loss, best=best)


def compared(cell: Cell, scored: Scored, reference: Scored, reference_bits: str) -> Quality:
    same = sum(one == other for one, other in zip(scored.best, reference.best, strict=True))
    return Quality(
        weights=cell.weights,
        bits=cell.bits,
        dtype=cell.dtype,
        positions=len(scored.best),
        perplexity=scored.perplexity,
        reference_bits=reference_bits,
        reference_perplexity=reference.perplexity,
        agreement=same / len(scored.best),
    )


if __name__ == "__main__":
    main()
