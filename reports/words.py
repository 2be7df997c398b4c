"""The sentences that a reader takes away, computed from the rows: the answer, and a line for each chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import structs

from harness.intervals import Control, controls
from harness.metrics import GIB, Row
from harness.results import Cell, Quality, Run, Training
from harness.stats import Interval
from reports.parts import Parts
from reports.tables import (
    bits_name,
    direction,
    gib,
    grouped,
    number,
    pareto,
    plain,
    side_of_one,
    target_name,
    times,
)

MOST_NAMES = 6
UNFAITHFUL = ("lossy_by_design", "diverged", "differs")


def device(run: Run) -> str:
    """The names of what it ran on."""
    names = dict.fromkeys(trial.device_name for trial in run.rows if trial.device_name)
    return plain(", ".join(names or dict.fromkeys(cell.device for cell in run.manifest.cells)) or "no device")


def sentences(run: Run, rows: Sequence[Row]) -> list[str]:
    """The whole answer: what fits a memory budget, where there is one, and what is fastest."""
    return [*fitting(rows, run.manifest.vram_budget_bytes), *answers(rows, device(run))]


def answers(rows: Sequence[Row], device: str) -> list[str]:
    """For each target one sentence: what is fastest, what gives the most per GiB, and how sure that is."""
    return [
        f"{'SYNTHETIC: in' if group[0].synthetic else 'In'} {target} on {plain(device)}, {_answer(group)}"
        for target, group in grouped(rows)
    ]


def fitting(rows: Sequence[Row], budget_bytes: int | None) -> list[str]:
    """What is fastest within a memory budget, over all bits, and how much context each method leaves room for."""
    contexts = list(dict.fromkeys(row.cell.context for row in rows))
    within = [] if budget_bytes is None else [_within(rows, budget_bytes, context, contexts) for context in contexts]
    return [*within, *_longest_contexts(rows)]


def _within(rows: Sequence[Row], budget_bytes: int, context: int | None, contexts: Sequence[int | None]) -> str:
    here = [row for row in rows if row.cell.context == context]
    fits = [row for row in here if row.decode_tokens_per_second and not _ran_out(row)]
    sure = [row for row in fits if row.verdict.kind not in UNFAITHFUL]
    ranked = sorted(sure, key=lambda row: -(row.decode_tokens_per_second or 0.0))
    where = f" at {context:,} tokens of context" if len(contexts) > 1 and context is not None else ""
    text = "SYNTHETIC: within" if any(row.synthetic for row in here) else "Within"
    text += f" {budget_bytes / GIB:.3g} GiB{where} "
    out = sum(map(_ran_out, here))
    cut = sum(not _ran_out(row) and (not row.trials_ok or "killed" in row.outcomes) for row in here)
    tail = f"; {out} of {len(here)} cells do not fit" * bool(out)
    tail += f"; {cut} of {len(here)} cells did not run to the end" * bool(cut)
    tail = f"{tail or '; every cell fits'}."
    if not ranked:
        return f"{text}nothing that was planned runs{tail}"
    told = [
        f"{plain(row.cell.label)} in {target_name(row.cell, [other.cell for other in here])} "
        f"({number(row.decode_tokens_per_second, 1)} tok/s, peak {number(gib(row.peak_bytes), 2)} GiB)"
        for row in ranked[:3]
    ]
    return f"{text}fastest is {told[0]}{', then ' * (len(told) > 1)}{', then '.join(told[1:])}{tail}"


def _longest_contexts(rows: Sequence[Row]) -> list[str]:
    """A sentence where several contexts were tried."""
    tried: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.cell.context is not None:
            tried.setdefault((row.cell.label, *_any_context(row).target), []).append(row)
    if max((len({row.cell.context for row in group}) for group in tried.values()), default=0) < 2:
        return []
    told, cells = [], list(map(_any_context, rows))
    for (label, *_), group in tried.items():
        fits = [row.cell.context or 0 for row in group if row.trials_ok and not _ran_out(row)]
        longest = f"{max(fits):,}" if fits else "none"
        told.append(f"{plain(label)} in {target_name(_any_context(group[0]), cells)} {longest}")
    return [f"Longest context, of those tried, that fits: {'; '.join(told)}."]


def _any_context(row: Row) -> Cell:
    return structs.replace(row.cell, context=None)


def _ran_out(row: Row) -> bool:
    return "oom" in row.outcomes


def _answer(group: Sequence[Row]) -> str:
    compared = [row for row in group if row.speedup is not None]
    faithful = [row for row in compared if row.verdict.kind not in UNFAITHFUL]
    if not compared:
        why = "no method finished a prompt that the baseline finished"
        if not any(row.is_baseline and row.trials_ok for row in group):
            why = "there is no baseline measured"
        elif all(row.is_baseline for row in group):
            why = "only the baseline was planned"
        return f"{why}: no speed-up can be given."
    if not faithful:
        return "no method that finished keeps the target's text: see the table."
    best = _leader(faithful)
    text = _fastest(best, faithful) + _faster_but_unfaithful(best, compared)
    per_gib = [row for row in faithful if row.per_gib_relative is not None]
    if inflated(group):
        return f"{text}; tok/s per GiB is left open, for memory does not add up (see the warnings)."
    return text + (
        f"; {_most_per_gib(max(per_gib, key=_per_gib), best)}." if per_gib else "; peak memory is not known."
    )


def _leader(faithful: Sequence[Row]) -> Row:
    """The highest speed-up; where its interval leaves open whether it is faster, the highest that surely is."""
    best = max(faithful, key=_speedup)
    told = {row.cell.id: direction(row.speedup) for row in faithful if row.speedup is not None}
    sure = [row for row in faithful if told[row.cell.id] == "faster"]
    return max(sure, key=_speedup) if sure and told[best.cell.id] == "no clear difference" else best


def inflated(rows: Sequence[Row]) -> bool:
    """Whether a peak holds more than what was counted."""
    return any(row.memory is not None and row.memory.inflated for row in rows)


def _fastest(best: Row, rivals: Sequence[Row]) -> str:
    label, interval = plain(best.cell.label), best.speedup
    assert interval is not None
    if side_of_one(interval) == "no clear difference":
        leads = "leads" if interval.value > 1 else "comes nearest"
        return f"nothing is clearly faster than plain decoding; {label} {leads} at {_sure(interval)}"
    if interval.value <= 1:
        return f"nothing is faster than plain decoding; {label} comes nearest at {_sure(interval)}"
    level = [plain(row.cell.label) for row in rivals if row is not best and _overlap(row.speedup, interval)]
    overlap = "intervals overlap" if len(level) > 1 else "interval overlaps"
    tie = f", level with {_listed(level)} whose {overlap}" if level else ""
    return f"{label} is fastest at {_sure(interval, ' plain decoding')}{tie}"


def _most_per_gib(row: Row, fastest: Row) -> str:
    relative = row.per_gib_relative
    assert relative is not None
    sure = _sure(relative, " the baseline's")
    side = side_of_one(relative)
    if relative.value <= 1 or side == "no clear difference":
        clearly = "" if side == "slower" else "clearly "
        return f"none {clearly}gives more tok/s per GiB than plain decoding (best: {plain(row.cell.label)}, {sure})"
    who = "it also" if row is fastest else plain(row.cell.label)
    return f"{who} gives the most tok/s per GiB, {number(row.tokens_per_second_per_gib, 1)}, {sure}"


def _faster_but_unfaithful(best: Row, compared: Sequence[Row]) -> str:
    ahead = [row for row in compared if row.verdict.kind in UNFAITHFUL and _speedup(row) > _speedup(best)]
    if not ahead:
        return ""
    names = _listed([f"{plain(row.cell.label)} ({times(_speedup(row))})" for row in ahead])
    return f" ({names} ran faster but did not keep the target's text)"


def against_itself(rows: Sequence[Row]) -> list[str]:
    """A/A: for each baseline, what noise alone does here."""
    names = {row.cell.id: target for target, group in grouped(rows) for row in group}
    return [f"{names[one.row.cell.id]}: {_control(one)}" for one in controls(rows)]


def _control(one: Control) -> str:
    if len(one.speeds) < 2:
        return "one round, so the baseline cannot be set against itself: `--rounds 4` shows what noise alone does."
    ran = (
        f"{min(one.speeds):.1f} to {max(one.speeds):.1f} tok/s over {len(one.speeds)} rounds "
        f"(spread {100 * one.spread:.1f} %)"
    )
    if one.ratio is None or one.ratio.low is None or one.ratio.high is None:
        return f"the baseline against itself ran at {ran}."
    holds = "holds 1, as it should" if one.holds else "does not hold 1"
    return (
        f"the baseline against itself, odd rounds over even ones, is {one.ratio.value:.3f} "
        f"(95 % interval {one.ratio.low:.3f} to {one.ratio.high:.3f}, which {holds}); it ran at {ran}."
    )


def changed_targets(run: Run) -> list[str]:
    """For each target that is not the base weights at 32 bits, how far it is from them."""
    return [_changed(one) for one in run.manifest.quality]


def _changed(one: Quality) -> str:
    merged = "" if one.weights == "base" else f" with the weights {plain(one.weights)}"
    return (
        f"{bits_name(one.bits)}{merged}: another model than the base in {bits_name(one.reference_bits)}. On held-out "
        f"text its perplexity is {one.perplexity:.2f} against {one.reference_perplexity:.2f}, and its next token is "
        f"the same at {one.agreement:.1%} of {one.positions:,} positions."
    )


def scatter_line(rows: Sequence[Row]) -> str:
    if inflated(rows):
        return "Memory does not add up (see the warnings): points lie too far to the right by what is unattributed."
    names, on_front = named(rows), pareto(rows)
    front = [names[row.cell.id] for _, group in grouped(rows) for row in group if row.cell.id in on_front]
    placed = [(row, target) for target, group in grouped(rows) for row in group if row.tokens_per_second_per_gib]
    densest, densest_target = max(placed, key=lambda pair: pair[0].tokens_per_second_per_gib or 0)
    fastest, fastest_target = max(placed, key=lambda pair: pair[0].decode_tokens_per_second or 0)
    return (
        f"Most for its memory: {plain(densest.cell.label)} in {densest_target}, "
        f"{number(densest.tokens_per_second_per_gib, 1)} tok/s per GiB. "
        f"Highest speed: {plain(fastest.cell.label)} in {fastest_target}, "
        f"{number(fastest.decode_tokens_per_second, 1)} tok/s in {number(gib(fastest.peak_bytes), 3)} GiB. "
        f"Pareto front: {_listed(front)}."
    )


def named(rows: Sequence[Row]) -> dict[str, str]:
    """What to call each cell: by its label, and its target where there are several."""
    groups = grouped(rows)
    several = len(groups) > 1
    return {row.cell.id: plain(row.cell.label) + f" in {target}" * several for target, group in groups for row in group}


def tau_line(rows: Sequence[Row]) -> str:
    names = named(rows)
    each = [(row.break_even_tau, row) for row in rows if row.break_even_tau is not None]
    lost = [names[row.cell.id] for cost, row in each if row.tau and row.tau < cost]
    (least, cheap), (most, dear) = (pick(each, key=lambda pair: pair[0]) for pick in (min, max))
    text = f"A pass of {names[cheap.cell.id]} costs {times(least)} a pass of plain decoding"
    text += f", of {names[dear.cell.id]} {times(most)}" * (cheap is not dear)
    text += ": what τ must exceed. "
    if not lost:
        return f"{text}All are above break-even."
    return f"{text}{_listed(lost)} put fewer tokens in the text per pass than a pass costs, and lose."


def phases_line(bars: Mapping[str, Parts]) -> str:
    shares = [
        (parts[name] / sum(parts.values()), name, bar) for bar, parts in bars.items() for name in parts if parts[name]
    ]
    share, name, bar = max(shares)
    return f"Largest share: {100 * share:.0f} % of a pass of {bar} is {name}."


def memory_line(bars: Mapping[str, Parts]) -> str:
    most, bar = max((parts.get("drafter", 0.0), bar) for bar, parts in bars.items())
    if not most:
        return "Nothing here has a drafter of its own in memory."
    peak = sum(size for name, size in bars[bar].items() if name != "slack")
    return f"The largest drafter is {bar}'s, {number(most, 3)} of {number(peak, 3)} GiB."


def acceptance_line(rows: Sequence[Row]) -> str:
    names = named(rows)
    first = [(row.acceptance[0].probability or 0.0, row) for row in rows if row.acceptance]
    (high, best), (low, worst) = (pick(first, key=lambda pair: pair[0]) for pick in (max, min))
    text = f"The first drafted token of {names[best.cell.id]} is accepted in {100 * high:.0f} % of its passes"
    return f"{text}, of {names[worst.cell.id]} in {100 * low:.0f} %." if best is not worst else f"{text}."


def category_line(rows: Sequence[Row]) -> str:
    names = named(rows)
    each = [(part.speedup.value, part.category, row) for row in rows for part in row.speedup_by_category]
    (high, best, winner), (low, worst, loser) = (pick(each, key=lambda part: part[0]) for pick in (max, min))
    slower = sum(value < 1 for value, _, _ in each)
    return (
        f"Highest: {names[winner.cell.id]} on {plain(best)}, {times(high)}; "
        f"lowest: {names[loser.cell.id]} on {plain(worst)}, {times(low)}. "
        f"{slower} of {len(each)} pairs of method and category are slower than plain decoding."
    )


def training_line(training: Sequence[Training], rows: Sequence[Row]) -> str:
    paid = {one.method: training_seconds(one) for one in training}
    gains = [(row.speedup.value, row) for row in rows if row.speedup and row.cell.method in paid]
    gain, best = max(gains, key=lambda pair: pair[0])
    cheapest = min(paid, key=lambda name: paid[name])
    label = named(rows)[best.cell.id]
    leads = f"{label} gains most" if gain > 1 else f"No trained drafter gains here; {label} comes nearest"
    text = f"{leads}, {times(gain)}, after {paid[best.cell.method]:,.0f} s of training"
    if cheapest == best.cell.method:
        return f"{text}, the least that any took."
    return f"{text}; {plain(cheapest)} took the least, {paid[cheapest]:,.0f} s."


def training_seconds(one: Training) -> float:
    """All that a drafter took: its own steps, the target's passes and the writing of the text."""
    return one.seconds + one.shared_seconds + one.data_seconds


def _sure(interval: Interval, of: str = "") -> str:
    if interval.low is None or interval.high is None:
        return f"{times(interval.value)}{of} (one round: no interval)"
    return f"{times(interval.value)}{of} (95 % interval {interval.low:.2f} to {interval.high:.2f})"


def _speedup(row: Row) -> float:
    assert row.speedup is not None
    return row.speedup.value


def _per_gib(row: Row) -> float:
    assert row.per_gib_relative is not None
    return row.per_gib_relative.value


def _overlap(one: Interval | None, two: Interval) -> bool:
    if one is None or one.low is None or one.high is None or two.low is None or two.high is None:
        return False
    return one.low <= two.high and two.low <= one.high


def _listed(names: Sequence[str]) -> str:
    """At most `MOST_NAMES` of them."""
    if len(names) > MOST_NAMES:
        names = [*names[: MOST_NAMES - 1], f"{len(names) - MOST_NAMES + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
