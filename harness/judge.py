"""What float64 says of greedy texts that differ from their baseline's: `python -m harness.judge JOB.json`.

Only the first differing token of an answer is scored again: after it the two texts are about different things. One line
a place goes to `judged.jsonl`; places that are there already are not scored again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from harness import child, weights
from harness.metrics import Parting, unjudged
from harness.plan import Plan, RunJob
from harness.rescore import Float64
from harness.results import Judged, append_line, read_run
from harness.weights import Bits, ModelSource
from harness.worker import diagnose, encoded, exact_float32


def main() -> None:
    emit = child.to_parent()
    judge(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=RunJob), emit)


def judge(job: RunJob, emit: child.Emit) -> None:
    """A target that does not fit in float64 leaves its texts unjudged, and says so."""
    directory = Path(job.directory)
    plan = msgspec.json.decode((directory / "plan.json").read_bytes(), type=Plan)
    answers = msgspec.json.decode((directory / "first_answers.json").read_bytes(), type=dict[str, list[str]])
    exact_float32()
    groups: dict[tuple[str, ...], list[Parting]] = {}
    for parting in unjudged(read_run(directory)):
        groups.setdefault(parting.cell.target, []).append(parting)
    for partings in groups.values():
        count = f"{len(partings)} differing answer{'s' * (len(partings) != 1)}"
        emit(child.Preparing(f"scoring {count} again in float64"))
        try:
            _score(partings, plan, job.sources, answers, directory / "judged.jsonl")
        except Exception as error:
            outcome, reason = diagnose(error)
            emit(child.Warned(f"{count} could not be judged in float64: {outcome}: {reason}"))


def _score(
    partings: Sequence[Parting], plan: Plan, sources: dict[str, ModelSource], answers: dict[str, list[str]], path: Path
) -> None:
    """Score the places of one target."""
    cell = partings[0].cell
    loaded = weights.load(
        sources.get(cell.weights, plan.model),
        Bits.parse(cell.bits),
        device=cell.device,
        dtype=cell.dtype,
        device_map=plan.device_map,
        trust_remote_code=plan.trust_remote_code,
    )
    prompts = encoded(plan, loaded, answers, cell.context)
    scale = Float64(loaded.model.double())  # in place: nobody else needs it, and two may not fit
    for one in partings:
        at, margin = one.position, None
        if at < min(len(one.text), len(one.expected)):
            ids_T = [*prompts[one.prompt_id, one.turn], *one.expected[:at]]
            margin = scale.gap(ids_T, one.expected[at], one.text[at])
        found = Judged(cell=one.cell.id, prompt_id=one.prompt_id, turn=one.turn, position=at, margin=margin)
        append_line(path, found)


if __name__ == "__main__":
    main()
