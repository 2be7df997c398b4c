"""Every derived number, in one place: `trial_frame` gives one row a trial, `summary` one `Row` a cell.

A failed trial has an outcome and a reason, and gives no number to anything here. A speed is a sum of tokens over a sum
of seconds; a speed-up pairs trials with the autoregressive cell on the same target.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd

from harness.acceptance import even_chance
from harness.decomposition import RoundCost, floor_share, round_cost
from harness.memory import Attribution, attribute
from harness.results import BASELINE, Cell, Manifest, Memory, Roofline, Run, Trial, refuse_mixture
from harness.stats import Interval, Ratio, bootstrap_over_prompts, ratio_interval_over_rounds, standings

GIB = 2**30
REPEAT_NGRAM = 9
SAME_MEMORY_SHARE = 0.005
"peaks closer than this are the allocator's noise: no ratio is taken over so small an extra"

Margins = dict[tuple[str, str, int, int], float | None]
"by cell, prompt, turn and position: logits apart in float64; None where one text ends"

VerdictKind = Literal[
    "reference",
    "identical",
    "near_tie",
    "diverged",
    "differs",
    "near_tie_not_excluded",
    "not_testable",
    "lossy_by_design",
    "sampled",
    "drawn",
    "no_pairs",
]

BROKEN: tuple[VerdictKind, ...] = ("diverged", "differs")
"kinds that say the output is not the target's, or not yet that it is"
KEPT: tuple[VerdictKind, ...] = ("reference", "identical", "near_tie")
"kinds that say it is"
NEAR_TIE = {"32": 2e-4, "16": 0.25}
"logits apart in float64 that rounding explains, by precision; none for quantised weights"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Trials of one cell that failed in the same way."""

    outcome: str
    reason: str | None
    trials: int


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds."""

    p50: float
    p95: float
    p99: float


class DepthAcceptance(msgspec.Struct, frozen=True, kw_only=True):
    """P(depth accepted | the depth above accepted), over the verify passes that drafted this deep."""

    depth: int
    drafted: int
    "passes that drafted this depth"
    passes: int
    "all passes of the cell"
    reached: int
    "passes that drafted this depth and accepted the one above"
    accepted: int
    prompt_mean: float | None
    "mean of the per-prompt probabilities, each prompt weighing the same"

    @property
    def probability(self) -> float | None:
        return self.accepted / self.reached if self.reached else None


class CategorySpeedup(msgspec.Struct, frozen=True, kw_only=True):
    category: str
    prompts: int
    speedup: Interval


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the text is the target's, as far as token ids alone can say. An answer is one (prompt, turn)."""

    kind: VerdictKind
    answers: int
    "answers that both this cell and the baseline gave"
    differing: int
    first_position: int | None = None
    "smallest index into the new tokens where an answer parts from the baseline's"
    first_prompt: str | None = None
    margin: float | None = None
    "of the answers that differ and were scored again in float64, the largest, in logits"
    at_32_bits: VerdictKind | None = None
    "of the same method in 32 bits, where the run has it and these bits tell nothing"


class Parting(msgspec.Struct, frozen=True, kw_only=True):
    """Where an answer parts from the baseline's, and both."""

    cell: Cell
    prompt_id: str
    turn: int
    position: int
    text: list[int]
    expected: list[int]

    @property
    def key(self) -> tuple[str, str, int, int]:
        return (self.cell.id, self.prompt_id, self.turn, self.position)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What one cell's trials say. None where there is nothing to derive a number from."""

    cell: Cell
    lossless: bool
    temperature: float
    synthetic: bool
    trials_ok: int
    trials_failed: int
    outcomes: dict[str, int]
    failures: tuple[Failure, ...]
    prompts: int
    "prompts with at least one good trial"
    new_tokens: int
    decode_tokens: int
    "new tokens after the first of each trial"
    decode_seconds: float
    verify_passes: int
    decode_tokens_per_second: float | None
    end_to_end_tokens_per_second: float | None
    first_token_seconds: float | None
    "median over trials"
    round_seconds: Percentiles | None
    "one verify pass and what belongs to it"
    speed_by_round: dict[int, float]
    "decode tokens per second in each measured round: the baseline's own spread is the A/A check"
    baseline: str | None
    "id of the cell that the speed-up is measured against"
    pairs: int = 0
    speedup: Interval | None = None
    "for these prompts on this machine"
    speedup_prompts: Interval | None = None
    "the same ratio, for prompts like these"
    speedup_by_category: tuple[CategorySpeedup, ...] = ()
    rank: int | None = None
    "best place among the cells of the same target that the intervals leave open; None without an interval"
    rank_last: int | None = None
    "the last place that the intervals leave open: 2 beside a rank of 1 where one other cell overlaps"
    tau: float | None
    tau_prompt_mean: float | None
    tau_without_repeats: float | None
    "over the passes whose first token does not continue a repeat"
    repeated_share: float | None
    acceptance: tuple[DepthAcceptance, ...]
    peak_bytes: int | None
    peak_kind: str
    "which field of Memory `peak_bytes` is"
    peak_by_device: dict[str, int] = {}
    "bytes, of a target on several devices, which has no `peak_bytes`"
    memory: Attribution | None = None
    "of the trial that reached the peak"
    tokens_per_second_per_gib: float | None
    per_gib_relative: Interval | None = None
    "speed-up times the baseline's peak over this peak"
    marginal_tokens_per_second_per_gib: float | None = None
    "extra speed per extra GiB over the baseline; None unless the memory is larger by `SAME_MEMORY_SHARE`"
    break_even_tau: float | None = None
    "tokens per round at which this cell would be as fast as its baseline: a round's time in baseline steps"
    break_even_chance: float | None = None
    "the acceptance, the same at every depth that it drafts, which gives that; None where none is enough"
    round_cost: RoundCost | None = None
    "where a round's time goes, and how that explains the speed-up"
    floor_share: float | None = None
    "of the speed that the device's read bandwidth allows a baseline step, what this cell's verify passes reach"
    host_syncs_per_pass: float | None
    joules_per_token: float | None
    verdict: Verdict

    @property
    def places(self) -> str:
        """`1`, or `1-2` where intervals overlap; nothing without an interval."""
        if self.rank is None or self.rank_last is None:
            return ""
        return str(self.rank) if self.rank == self.rank_last else f"{self.rank}-{self.rank_last}"

    @property
    def is_baseline(self) -> bool:
        return self.cell.method == BASELINE


def peak_kind(device: str) -> str:
    """The field of Memory that is the peak on this device."""
    return "peak_rss_bytes" if device.startswith("cpu") else "peak_allocated_bytes"


def repeats(tokens_T: Sequence[int], n: int = REPEAT_NGRAM) -> list[bool]:
    """For each token, whether the n-gram that it ends stood earlier in the same text."""
    grams = list(zip(*(tokens_T[start:] for start in range(n)), strict=False))
    if len(set(grams)) == len(grams):  # most texts, and most of the time that a large run takes
        return [False] * len(tokens_T)
    seen: set[tuple[int, ...]] = set()
    marks = [False] * (n - 1)
    for gram in grams:
        marks.append(gram in seen)
        seen.add(gram)
    return marks


def trial_frame(run: Run) -> pd.DataFrame:
    """One row a trial, in file order, rates derived; a trial measured twice counts once, as its last line says.

    A failed trial's measurements are missing values whatever its line holds.
    """
    return _frame(run).copy()


@lru_cache(maxsize=2)
def _frame(run: Run) -> pd.DataFrame:
    """`summary` and the intervals ask for it in turn."""
    frame = pd.DataFrame([_record(trial) for trial in _latest(run.rows)], columns=list(_COLUMNS)).astype(_COLUMNS)
    frame["decode_tokens_per_second"] = _rate(frame.decode_tokens, frame.decode_seconds)
    frame["end_to_end_tokens_per_second"] = _rate(frame.new_tokens, frame.prefill_seconds + frame.decode_seconds)
    frame["tau"] = _rate(frame.decode_tokens, frame.verify_passes)
    frame["host_syncs_per_pass"] = _rate(frame.host_syncs, frame.verify_passes)
    frame["joules_per_token"] = _rate(frame.energy_joules, frame.new_tokens)
    return frame


def summary(run: Run) -> list[Row]:
    """One row for each planned cell, in the plan's order, then for cells that the plan does not name.

    Raises UserError where synthetic trials and real ones are mixed.
    """
    refuse_mixture(run)
    measured = _measured(run)
    baselines = _baselines(measured)
    judged: Margins = {one.key: one.margin for one in run.judged}
    rows = [_row(one, baselines.get(one.cell.target), run.manifest, judged) for one in measured]
    explained = [
        _explained(row, one, baselines.get(one.cell.target), run.manifest.roofline)
        for row, one in zip(rows, measured, strict=True)
    ]
    return _ranked(_with_32_bits(explained))


def _explained(row: Row, own: Measured, base: Measured | None, device: Roofline | None) -> Row:
    """The row with where its time went."""
    speedup = None if row.speedup is None else row.speedup.value
    cost = round_cost(own.ok, base.ok if base else (), speedup)
    return msgspec.structs.replace(row, round_cost=cost, floor_share=floor_share(own.ok, device))


def _measured(run: Run) -> list[Measured]:
    frame = trial_frame(run)
    frame = frame[frame.outcome == "ok"]
    trials: dict[str, list[Trial]] = {cell.id: [] for cell in run.manifest.cells}
    for trial in _latest(run.rows):
        trials.setdefault(trial.cell.id, []).append(trial)
    cells = {cell.id: cell for cell in (*run.manifest.cells, *(each[0].cell for each in trials.values() if each))}
    return [
        Measured(
            cell=cells[id],
            trials=each,
            ok=[trial for trial in each if trial.outcome == "ok"],
            good=frame[frame.cell == id],
        )
        for id, each in trials.items()
    ]


def _baselines(measured: Sequence[Measured]) -> dict[tuple[str, ...], Measured]:
    """By target."""
    return {one.cell.target: one for one in reversed(measured) if one.cell.method == BASELINE}


def _with_32_bits(rows: list[Row]) -> list[Row]:
    """Where bits tell nothing of a method, what 32 bits say of it."""

    def key(row: Row) -> tuple[object, ...]:
        return row.cell.label, row.cell.weights, row.cell.runtime, row.cell.context

    precise = {key(row): row.verdict.kind for row in rows if row.cell.bits == "32"}

    def told(row: Row) -> Row:
        if row.verdict.kind != "not_testable":
            return row
        kind = precise.get(key(row))
        return msgspec.structs.replace(row, verdict=msgspec.structs.replace(row.verdict, at_32_bits=kind))

    return [told(row) for row in rows]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One cell and its trials: all, the good ones, and the good ones' rows of the frame."""

    cell: Cell
    trials: list[Trial]
    ok: list[Trial]
    good: pd.DataFrame

    @property
    def peak_bytes(self) -> int | None:
        peak = self.good.peak_bytes.max()
        return None if pd.isna(peak) else int(peak)

    @property
    def peak_by_device(self) -> dict[str, int]:
        """The largest of all trials, a device."""
        peaks: dict[str, int] = {}
        for trial in self.ok:
            for device, peak in ((trial.memory and trial.memory.peak_allocated_by_device) or {}).items():
                peaks[device] = max(peak, peaks.get(device, 0))
        return peaks

    @property
    def attribution(self) -> Attribution | None:
        kind, peak = peak_kind(self.cell.device), self.peak_bytes
        reached = (one.memory for one in self.ok if one.memory and getattr(one.memory, kind) == peak is not None)
        return next((attribute(memory) for memory in reached), None)


def _row(own: Measured, base: Measured | None, manifest: Manifest, judged: Margins) -> Row:
    good, failed = own.good, [trial for trial in own.trials if trial.outcome != "ok"]
    lossless = all(trial.lossless for trial in own.trials)
    speed = _sum_ratio(good.decode_tokens, good.decode_seconds)
    peak = own.peak_bytes
    return Row(
        cell=own.cell,
        lossless=lossless,
        temperature=manifest.temperature,
        synthetic=manifest.synthetic or any(trial.synthetic for trial in own.trials),
        trials_ok=len(own.ok),
        trials_failed=len(failed),
        outcomes=dict(Counter(trial.outcome for trial in own.trials)),
        failures=tuple(
            Failure(outcome=outcome, reason=reason, trials=count)
            for (outcome, reason), count in Counter((trial.outcome, trial.reason) for trial in failed).items()
        ),
        prompts=good.prompt_id.nunique(),
        new_tokens=int(good.new_tokens.sum()),
        decode_tokens=int(good.decode_tokens.sum()),
        decode_seconds=float(good.decode_seconds.sum()),
        verify_passes=int(good.verify_passes.sum()),
        decode_tokens_per_second=speed,
        end_to_end_tokens_per_second=_sum_ratio(good.new_tokens, good.prefill_seconds + good.decode_seconds),
        first_token_seconds=_present(good.prefill_seconds.median()),
        round_seconds=_percentiles([seconds for trial in own.ok for seconds in trial.round_seconds or ()]),
        speed_by_round={int(one): rate for one, rate in rate_by_round(good, "decode_tokens", "decode_seconds").items()},
        **_against(own, base),
        tau=_sum_ratio(good.decode_tokens, good.verify_passes),
        tau_prompt_mean=_present(_per_prompt(good, "decode_tokens", "verify_passes").mean()),
        tau_without_repeats=_sum_ratio(good.fresh_tokens, good.fresh_passes),
        repeated_share=_sum_ratio(good.repeated_tokens, good.new_tokens),
        acceptance=acceptance_by_depth(own.ok),
        peak_bytes=peak,
        peak_kind=peak_kind(own.cell.device),
        peak_by_device=own.peak_by_device,
        memory=own.attribution,
        tokens_per_second_per_gib=speed / (peak / GIB) if speed and peak else None,
        host_syncs_per_pass=_sum_ratio(good.host_syncs, good.verify_passes),
        joules_per_token=_sum_ratio(good.energy_joules, good.new_tokens),
        verdict=_verdict(own, base, manifest.temperature, lossless, judged),
    )


def _against(own: Measured, base: Measured | None) -> dict[str, Any]:
    """The fields of Row that need the baseline, over the pairs of trials that both sides finished."""
    if base is None or own.cell.method == BASELINE or (pairs := pairs_of(own.good, base.good)).empty:
        return {"baseline": base.cell.id if base else None}
    by_round = sides_by(pairs, "round")
    speedup = speedup_over_rounds(pairs)
    step = _sum_ratio(pairs.decode_seconds_base, pairs.verify_passes_base)
    round_ = _sum_ratio(pairs.decode_seconds, pairs.verify_passes)
    break_even = round_ / step if round_ and step else None
    peaks = [_present(pairs[name].max()) for name in ("peak_bytes", "peak_bytes_base")]
    memory = (peaks[0], peaks[1]) if peaks[0] and peaks[1] else None
    extra_speed, extra_bytes = by_round[0].value - by_round[1].value, memory[0] - memory[1] if memory else 0
    return {
        "baseline": base.cell.id,
        "pairs": len(pairs),
        "speedup": speedup,
        "speedup_prompts": bootstrap_over_prompts(*sides_by(pairs, "prompt_id")),
        "speedup_by_category": tuple(
            CategorySpeedup(
                category=str(category),
                prompts=part.prompt_id.nunique(),
                speedup=speedup_over_rounds(part),
            )
            for category, part in pairs.groupby("category", sort=False)
        ),
        "break_even_tau": break_even,
        "break_even_chance": _chance(break_even, own.ok),
        "per_gib_relative": speedup.scaled(memory[1] / memory[0]) if memory else None,
        "marginal_tokens_per_second_per_gib": (
            extra_speed / (extra_bytes / GIB) if memory and extra_bytes > SAME_MEMORY_SHARE * memory[1] else None
        ),
    }


def _chance(tau: float | None, trials: Iterable[Trial]) -> float | None:
    """The chance, the same at every depth, that gives `tau` over the depths that were drafted; None where none does."""
    return None if tau is None else even_chance(tau, Counter(d for trial in trials for d in trial.drafted_depth or ()))


def acceptance_by_depth(trials: Iterable[Trial]) -> tuple[DepthAcceptance, ...]:
    """From the per-pass counts of good trials; nothing for a method that drafts nothing."""
    by_prompt: dict[str, Counter[tuple[int, int]]] = {}
    for trial in trials:
        if trial.drafted_depth and trial.accepted:
            counts = zip(trial.drafted_depth, trial.accepted, strict=True)
            by_prompt.setdefault(trial.prompt_id, Counter()).update(counts)
    passes: Counter[tuple[int, int]] = Counter()
    for each in by_prompt.values():
        passes.update(each)
    deepest = max((depth for depth, _ in passes), default=0)
    rows = []
    for depth in range(1, deepest + 1):
        reached, accepted = depth_counts(passes, depth)
        shares = [a / r for r, a in (depth_counts(each, depth) for each in by_prompt.values()) if r]
        rows.append(
            DepthAcceptance(
                depth=depth,
                drafted=sum(count for (drafted, _), count in passes.items() if drafted >= depth),
                passes=passes.total(),
                reached=reached,
                accepted=accepted,
                prompt_mean=statistics.fmean(shares) if shares else None,
            )
        )
    return tuple(rows)


def depth_counts(passes: Counter[tuple[int, int]], depth: int) -> tuple[int, int]:
    """(reached, accepted) at `depth`, counted from 1, over passes counted by (deepest drafted, accepted)."""
    reached = {
        (drafted, accepted): count
        for (drafted, accepted), count in passes.items()
        if drafted >= depth and accepted >= depth - 1
    }
    return sum(reached.values()), sum(count for (_, accepted), count in reached.items() if accepted >= depth)


def _verdict(own: Measured, base: Measured | None, temperature: float, lossless: bool, judged: Margins) -> Verdict:
    answers, parted = _partings(own, base)
    earliest = min(parted, key=lambda parting: parting.position, default=None)
    margins = [judged[parting.key] for parting in parted if parting.key in judged]
    return Verdict(
        kind=(
            "drawn"
            if any(trial.drawn_acceptance is not None for trial in own.ok)
            else _verdict_kind(own.cell, temperature, lossless, answers, parted, judged)
        ),
        answers=answers,
        differing=len(parted),
        first_position=earliest.position if earliest else None,
        first_prompt=earliest.prompt_id if earliest else None,
        margin=max((margin for margin in margins if margin is not None), default=None),
    )


def _partings(own: Measured, base: Measured | None) -> tuple[int, list[Parting]]:
    """(answers that both sides gave, where those that differ do so first)."""
    base_ok = base.ok if base else []
    by_round = {(t.prompt_id, t.turn, t.round): t.new_tokens for t in base_ok}
    first = {(t.prompt_id, t.turn): t.new_tokens for t in reversed(base_ok)}
    answers: set[tuple[str, int]] = set()
    parted: dict[tuple[str, int], Parting] = {}
    for trial in own.ok:
        answer = (trial.prompt_id, trial.turn)
        # The baseline is set against its own first round: what differs there is the target's, not a method's.
        same_round = None if own.cell.method == BASELINE else by_round.get((*answer, trial.round))
        expected = same_round if same_round is not None else first.get(answer)
        if expected is None or trial.new_tokens is None:
            continue
        answers.add(answer)
        position = first_difference(trial.new_tokens, expected)
        if position is not None and (answer not in parted or position < parted[answer].position):
            parted[answer] = Parting(
                cell=own.cell, prompt_id=trial.prompt_id, turn=trial.turn, position=position, text=trial.new_tokens,
                expected=expected,
            )  # fmt: skip
    return len(answers), list(parted.values())


def _verdict_kind(
    cell: Cell, temperature: float, lossless: bool, answers: int, parted: Sequence[Parting], judged: Margins
) -> VerdictKind:
    if cell.method == BASELINE:
        return "reference"
    if not lossless:
        return "lossy_by_design"
    if temperature > 0:
        return "sampled"
    if not answers:
        return "no_pairs"
    if cell.bits.startswith("int8"):
        return "not_testable"
    if not parted:
        return "identical"
    if cell.bits in NEAR_TIE and all(parting.key in judged for parting in parted):
        margins = [judged[parting.key] for parting in parted]
        tie = all(margin is not None and margin < NEAR_TIE[cell.bits] for margin in margins)
        return "near_tie" if tie else "diverged"
    return "differs" if cell.bits == "32" else "near_tie_not_excluded"


def unjudged(run: Run) -> list[Parting]:
    """Greedy answers of lossless methods whose difference from the baseline's only float64 can judge, and has not."""
    if run.manifest.temperature > 0 or any(row.drawn_acceptance is not None for row in run.rows):
        return []
    known = {one.key for one in run.judged}
    found = []
    measured = _measured(run)
    baselines = _baselines(measured)
    for own in measured:
        if own.cell.method != BASELINE and own.cell.bits in NEAR_TIE and all(trial.lossless for trial in own.ok):
            found += [one for one in _partings(own, baselines.get(own.cell.target))[1] if one.key not in known]
    return found


def first_difference(tokens_T: Sequence[int], expected_T: Sequence[int]) -> int | None:
    """Index of the first token that differs; the shorter length where one text only goes on longer; None when equal."""
    for index, (token, expected) in enumerate(zip(tokens_T, expected_T, strict=False)):
        if token != expected:
            return index
    return None if len(tokens_T) == len(expected_T) else min(len(tokens_T), len(expected_T))


def fresh(committed: Sequence[int], marks_T: Sequence[bool]) -> tuple[int, int]:
    """(tokens, passes) of the verify passes whose first token does not continue a repeat."""
    tokens = passes = 0
    at = 1  # the prompt's own pass gave token 0
    for count in committed:
        if count and not marks_T[at]:
            tokens, passes = tokens + count, passes + 1
        at += count
    return tokens, passes


def pairs_of(good: pd.DataFrame, base_good: pd.DataFrame) -> pd.DataFrame:
    """Good trials of both sides of the same prompt, turn and round, where something was decoded."""
    keys = ["prompt_id", "turn", "round"]
    values = ["decode_tokens", "decode_seconds", "verify_passes", "peak_bytes"]
    own, base = (side[(side.decode_tokens > 0) & (side.decode_seconds > 0)] for side in (good, base_good))
    return own[[*keys, "category", *values]].merge(base[[*keys, *values]], on=keys, suffixes=("", "_base"))


def sides_by(pairs: pd.DataFrame, by: str) -> tuple[Ratio, Ratio]:
    """Both sides' tokens per second, one sample for each value of `by`."""
    names = ["decode_tokens", "decode_seconds", "decode_tokens_base", "decode_seconds_base"]
    code, _ = pd.factorize(pairs[by], sort=True)
    tokens, seconds, base_tokens, base_seconds = (
        np.bincount(code, weights=pairs[name].to_numpy(float)).tolist() for name in names
    )
    return Ratio(tokens, seconds), Ratio(base_tokens, base_seconds)


def speedup_over_rounds(pairs: pd.DataFrame) -> Interval:
    """A round that lacks turns counts as what it says of those it has."""
    return ratio_interval_over_rounds(*sides_by(pairs, "round"), standing=standings_of(pairs))


def standings_of(pairs: pd.DataFrame) -> list[float]:
    """Of the rounds of pairs, by their turns."""
    own = Ratio(pairs.decode_tokens.tolist(), pairs.decode_seconds.tolist())
    base = Ratio(pairs.decode_tokens_base.tolist(), pairs.decode_seconds_base.tolist())
    return standings(pairs["round"].tolist(), turn_numbers(pairs), own, base)


def turn_numbers(frame: pd.DataFrame) -> list[int]:
    """A number for each trial, the same for trials of the same turn of the same prompt."""
    numbers: list[int] = frame.groupby(["prompt_id", "turn"], sort=False).ngroup().tolist()
    return numbers


def _ranked(rows: list[Row]) -> list[Row]:
    """The places that intervals leave open among the cells of the same target; the baseline is exactly 1."""

    def ends(row: Row) -> tuple[float, float] | None:
        if row.is_baseline and row.trials_ok:
            return (1.0, 1.0)
        if row.speedup is None or row.speedup.low is None or row.speedup.high is None:
            return None
        return (row.speedup.low, row.speedup.high)

    def placed(row: Row) -> Row:
        own = ends(row)
        others = [ends(other) for other in rows if other.cell.target == row.cell.target and other is not row]
        rivals = [rival for rival in others if rival]
        if own is None or not rivals:
            return row
        best = 1 + sum(rival[0] > own[1] for rival in rivals)
        worst = 1 + len(rivals) - sum(rival[1] < own[0] for rival in rivals)
        return msgspec.structs.replace(row, rank=best, rank_last=worst)

    return [placed(row) for row in rows]


_TEXT = (
    *("run", "cell", "method", "label", "model", "bits", "weights", "runtime", "device", "device_name", "device_uuid"),
    *("prompt_set", "prompt_id", "category", "outcome", "reason"),
)
_MEASURED = (
    *("prompt_tokens", "new_tokens", "decode_tokens", "verify_passes", "prefill_seconds", "decode_seconds"),
    *("drafted_tokens", "accepted_tokens", "repeated_tokens", "fresh_tokens", "fresh_passes", "host_syncs"),
    *("energy_joules", "peak_bytes", *(name for name in Memory.__struct_fields__ if not name.endswith("by_device"))),
)
_COLUMNS = {
    **dict.fromkeys(_TEXT, "object"),
    **dict.fromkeys(("round", "order", "turn"), "int64"),
    **dict.fromkeys(("lossless", "synthetic"), "bool"),
    **dict.fromkeys(("temperature", *_MEASURED), "float64"),
}


def _record(trial: Trial) -> dict[str, Any]:
    cell = {name: value for name, value in msgspec.structs.asdict(trial.cell).items() if name in _TEXT}
    planned = {name: value for name, value in msgspec.structs.asdict(trial).items() if name not in _MEASURED}
    return planned | cell | {"cell": trial.cell.id} | (_measurements(trial) if trial.outcome == "ok" else {})


def _measurements(trial: Trial) -> dict[str, Any]:
    tokens_T, committed = trial.new_tokens or [], trial.committed or []
    marks_T = repeats(tokens_T)
    fresh_tokens, fresh_passes = fresh(committed, marks_T)
    memory = msgspec.structs.asdict(trial.memory or Memory())
    return memory | {
        "prompt_tokens": trial.prompt_tokens,
        "new_tokens": len(tokens_T),
        "decode_tokens": max(len(tokens_T) - 1, 0),
        "verify_passes": len(committed),
        "prefill_seconds": trial.prefill_seconds,
        "decode_seconds": trial.decode_seconds,
        "drafted_tokens": sum(trial.drafted or ()),
        "accepted_tokens": sum(trial.accepted or ()),
        "repeated_tokens": sum(marks_T),
        "fresh_tokens": fresh_tokens,
        "fresh_passes": fresh_passes,
        "host_syncs": trial.host_syncs,
        "energy_joules": trial.energy_joules,
        "peak_bytes": memory[peak_kind(trial.cell.device)],
    }


def _latest(trials: Iterable[Trial]) -> list[Trial]:
    return list({trial.key: trial for trial in trials}.values())


def _rate(amount: pd.Series[float], per: pd.Series[float]) -> pd.Series[float]:
    return amount / per.where(per > 0)


def _sum_ratio(amount: pd.Series[float], per: pd.Series[float]) -> float | None:
    """Sum over sum, of the rows that have both; None where the divisor is nothing."""
    both = amount.notna() & per.notna()
    total = float(per[both].sum())
    return float(amount[both].sum()) / total if total > 0 else None


def rate_by_round(good: pd.DataFrame, amount: str, per: str) -> dict[Any, float]:
    """Of the trials that have both: each round's rate on the turns it has, against that of all rounds on these."""
    some = good[(good[amount] > 0) & (good[per] > 0)]
    if some.empty:
        return {}
    sums = some.groupby("round")[[amount, per]].sum()
    both = Ratio(some[amount].tolist(), some[per].tolist())
    evened = (sums[amount] / sums[per]).to_numpy(float) / standings(some["round"].tolist(), turn_numbers(some), both)
    return dict(zip(sums.index, evened.tolist(), strict=True))


def _per_prompt(frame: pd.DataFrame, amount: str, per: str) -> pd.Series[float]:
    sums = frame.groupby("prompt_id")[[amount, per]].sum()
    return _rate(sums[amount], sums[per])


def _present(value: float) -> float | None:
    return None if pd.isna(value) else float(value)


def _percentiles(seconds: list[float]) -> Percentiles | None:
    if not seconds:
        return None
    p50, p95, p99 = pd.Series(seconds).quantile([0.50, 0.95, 0.99])
    return Percentiles(p50=float(p50), p95=float(p95), p99=float(p99))
