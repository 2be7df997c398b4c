"""Two sets of results against each other. Values in, values out; no torch.

Absolute figures are compared only between like runs (`harness.likeness`); ratios and what is deterministic are compared
in any case. Gates (`harness.gates`) say which differences count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from harness import metrics
from harness.errors import UserError
from harness.gates import METRICS, Change, Gate, Judgement, Status, judge
from harness.likeness import differences, library_facts, prompt_facts, same_fingerprint, unlike
from harness.metrics import first_difference
from harness.results import BASELINE, Run, refuse_mixture
from harness.sides import Own, Side
from harness.stats import (
    Interval,
    bootstrap_over_prompts,
    bootstrap_unpaired,
    change_between_rounds,
)

EXACT = "exact: the same machine and libraries decode the same prompts in the same way"
BY_DEFINITION = ("speedup", "pass_cost", "per_gib", "tau", "lossless")
"gates that say nothing of the baseline: it is held against itself"


@dataclass(frozen=True)
class CellComparison:
    id: str
    label: str
    bits: str
    prompts: int
    "turns that both sides finished"
    changes: dict[str, Change]
    verdict: tuple[str, str]
    "is the text the target's? on both sides"


@dataclass(frozen=True)
class Comparison:
    base: str
    new: str
    unlike: tuple[str, ...]
    "why absolute figures are not compared"
    notes: tuple[str, ...]
    cells: tuple[CellComparison, ...]
    judgements: tuple[Judgement, ...] = ()

    @property
    def regressed(self) -> list[Judgement]:
        return [judgement for judgement in self.judgements if judgement.status == "regressed"]

    @property
    def exit_status(self) -> int:
        return 1 if self.regressed else 0


def gather(name: str, runs: Sequence[Run]) -> Side:
    """Raises UserError where the runs of one side cannot stand together."""
    for run in runs[1:]:
        if reasons := unlike(runs[0], run):
            raise UserError(f"{name} holds unlike runs ({reasons[0]}): give one of them")
    return Side(name, tuple(runs))


def compare(base: Side, new: Side, gates: Sequence[Gate]) -> Comparison:
    """Every cell that both sides have, under every gate.

    Raises UserError where they have none in common, or one is synthetic and the other is not.
    """
    refuse_mixture(*base.runs, *new.runs)
    shared = [id for id in base.cells if id in new.cells]
    if not shared:
        raise UserError(
            f"{base.name} and {new.name} have no cell in common (label, bits, dtype, weights, runtime and device): "
            f"BASE has {', '.join(base.cells)}; NEW has {', '.join(new.cells)}"
        )
    reasons = unlike(base.runs[0], new.runs[0])
    context = Context(base, new, tuple(reasons))
    cells = tuple(context.cell(id) for id in shared)
    judgements = [judgement for cell in cells for judgement in context.judgements(cell, gates)]
    if gates and not any(judgement.status != "not judged" for judgement in judgements):
        why = "; ".join(dict.fromkeys(judgement.reason for judgement in judgements))
        raise UserError(f"no gate could be judged: {why or 'these gates say nothing of the baseline alone'}")
    return Comparison(base.name, new.name, tuple(reasons), tuple(context.notes()), cells, tuple(judgements))


@dataclass(frozen=True)
class Context:
    """Both sides, and what may be compared between them."""

    base: Side
    new: Side
    unlike: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> bool:
        return same_fingerprint(self.base.runs[0], self.new.runs[0])

    @cached_property
    def same_prompts(self) -> bool:
        known = prompt_facts(self.base.runs[0])
        return known == prompt_facts(self.new.runs[0])

    def notes(self) -> list[str]:
        lines = ["SYNTHETIC: random weights, or acceptance that was drawn"] * any(
            t.synthetic for t in self.base.runs[0].rows
        )
        lines += [f"{id} is in BASE only" for id in self.base.cells if id not in self.new.cells]
        lines += [f"{id} is in NEW only" for id in self.new.cells if id not in self.base.cells]
        for side, name in ((self.base, "BASE"), (self.new, "NEW")):
            torn = sum(run.skipped_lines for run in side.runs)
            if torn:
                lines.append(f"{torn} line{'s' * (torn != 1)} of {name} could not be read and are in no number here")
        lines += differences("libraries", library_facts(self.base.runs[0]), library_facts(self.new.runs[0]))
        for id, cell in self.base.cells.items():
            if id in self.new.cells:
                lines += differences(f"{cell.label}: options", cell.options, self.new.cells[id].options)
        return lines

    def cell(self, id: str) -> CellComparison:
        sides = [side.good[(side.good.cell == id) & (side.good.decode_tokens > 0)] for side in (self.base, self.new)]
        turns = [set(zip(side.prompt_id, side.turn, strict=True)) for side in sides]
        common = turns[0] & turns[1] if self.same_prompts else None
        found = [Own(side, id, common) for side in (self.base, self.new)]
        changes = {name: change for name in METRICS if (change := self._change(name, *found)) is not None}
        of = self.new.cells[id]
        return CellComparison(
            id=id,
            label=of.label,
            bits=of.bits,
            prompts=len(turns[0] & turns[1]) if common is not None else min(map(len, turns)),
            changes=changes,
            verdict=(self.base.verdicts[id].verdict.kind, self.new.verdicts[id].verdict.kind),
        )

    def _change(self, name: str, base: Own, new: Own) -> Change | None:
        metric = METRICS[name]
        values = base.value(name), new.value(name)
        if values[0] is None or values[1] is None or not values[0]:
            return None
        if metric.kind == "absolute" and self.unlike:
            return Change(name, values[0], values[1], None, self.unlike[0])
        ratio = values[1] / values[0]
        if metric.kind == "deterministic":
            interval = self._deterministic(name, ratio, base, new)
        else:
            rates = (new.per_round(name), base.per_round(name))
            interval = change_between_rounds(*rates, ratio)
        needs = "the same prompts and limits" if name == "held_bytes" else "two rounds or more"
        reason = f"give both sides {needs}" if interval.low is None else None
        return Change(name, values[0], values[1], interval, reason)

    def _deterministic(self, name: str, ratio: float, base: Own, new: Own) -> Interval:
        """Exact where nothing but the program can have changed it; else as sure as the prompts are many."""
        if name == "held_bytes" and not self.same_prompts:  # the cache follows the longest prompt
            return Interval(ratio, None, None, EXACT)
        if name == "held_bytes" or self.fingerprint:
            return Interval(ratio, ratio, ratio, EXACT)
        if self.same_prompts:
            return bootstrap_over_prompts(new.tau_by_prompt, base.tau_by_prompt)
        return bootstrap_unpaired(new.tau_by_prompt, base.tau_by_prompt)

    # --- gates

    def judgements(self, cell: CellComparison, gates: Sequence[Gate]) -> list[Judgement]:
        special: dict[str, Callable[[CellComparison], tuple[Status, str]]] = {
            "lossless": self._lossless,
            "output": self._output,
        }
        found = [Judgement("finished", cell.id, *failure)] if (failure := self._failure(cell)) else []
        for gate in gates:
            if gate.metric in BY_DEFINITION and self.new.cells[cell.id].method == BASELINE:
                continue
            check = special.get(gate.metric)
            status, reason = check(cell) if check else judge(gate, cell.changes.get(gate.metric))
            found.append(Judgement(gate.text, cell.id, status, reason))
        return found

    def _failure(self, cell: CellComparison) -> tuple[Status, str] | None:
        """A turn that BASE finished and NEW tried and could not, or a cell that NEW planned and has no trial of."""
        failed = self.new.failed.get(cell.id, {})
        if not failed and (self.base.good.cell == cell.id).any() and not (self.new.good.cell == cell.id).any():
            return "regressed", "planned, but NEW has no trial of it"
        finished = self.base.answers(cell.id).keys() - self.new.answers(cell.id).keys()
        lost = sorted(finished & failed.keys())
        if not lost:
            return None
        turns = "1 turn now fails" if len(lost) == 1 else f"{len(lost)} turns now fail"
        return "regressed", f"{turns}: {failed[lost[0]]}"

    def _lossless(self, cell: CellComparison) -> tuple[Status, str]:
        before, after = cell.verdict
        if after in metrics.BROKEN:
            return "regressed", f"{before} before, {after} now"
        return ("ok" if after in metrics.KEPT else "not judged"), after

    def _output(self, cell: CellComparison) -> tuple[Status, str]:
        """Equal fingerprints must give equal ids."""
        if not self.fingerprint:
            why = "sampled" if self.base.runs[0].manifest.temperature > 0 else "another fingerprint"
            return "not judged", f"{why}: texts may part at a near-tie"
        texts, now = self.base.answers(cell.id), self.new.answers(cell.id)
        common = [key for key in texts if key in now]
        parted = {key: at for key in common if (at := first_difference(texts[key], now[key])) is not None}
        if not common:
            return "not judged", "no turn in common"
        if not parted:
            return "ok", f"{len(common)} answers are equal"
        (prompt, turn), at = min(parted.items(), key=lambda item: item[1])
        where = f"first in {prompt} turn {turn + 1} at token {at + 1}"
        return "regressed", f"{len(parted)} of {len(common)} answers differ, {where}"
