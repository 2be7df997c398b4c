"""Rows as people read them: units in the header, numbers formatted here and nowhere before.

`table` gives plain strings, `markdown` and `rich_table` set them. A slow-down is told as plainly as a speed-up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.doubts import doubts
from harness.metrics import GIB, Row, Verdict
from harness.results import Cell, Run
from harness.stats import Interval

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

    from reports.parts import CategoryLine

NOTHING = "\N{EN DASH}"
WIDE_COLUMNS = 100
NUMERIC = ("tok/s", "τ", "peak GiB", "tok/s per GiB")

_VERDICTS: dict[str, str] = {
    "reference": "reference",
    "identical": "identical ({answers} answers)",
    "near_tie": "near-tie: {differing} of {answers} answers, at most {margin} logits apart",
    "diverged": "DIVERGED: {differing} of {answers} answers, first at token {position}",
    "differs": "DIFFERS: {differing} of {answers} answers, first at token {position}",
    "near_tie_not_excluded": "differs (near-tie not excluded): {differing} of {answers} answers, "
    "first at token {position}",
    "not_testable": "{differing} of {answers} answers differ; not testable in {bits}",
    "lossy_by_design": "lossy by design: {differing} of {answers} answers differ",
    "sampled": "sampled: texts are not comparable",
    "drawn": "SYNTHETIC: acceptance was drawn, texts mean nothing",
    "no_pairs": NOTHING,
}


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """One dict a row, header to text, fastest first within each target."""
    return [record(row, rows) for _, group in grouped(rows) for row in group]


def record(row: Row, among: Sequence[Row]) -> dict[str, str]:
    synthetic = {"break-even τ": break_even(row)} if any(other.synthetic for other in among) else {}
    return {
        "method": method(row),
        "bits": target_name(row.cell, [other.cell for other in among]),
        "tok/s": number(row.decode_tokens_per_second, 1),
        "speed-up (95 %, these prompts, this machine)": speedup(row),
        "(95 %, prompts like these)": span(row.speedup_prompts),
        "τ": number(row.tau, 2),
        **synthetic,
        "acceptance by depth": acceptance(row),
        "peak GiB": peak(row),
        "tok/s per GiB": number(row.tokens_per_second_per_gib, 1),
        "identical to the target?": verdict(row),
    }


def break_even(row: Row) -> str:
    """Tokens per round that would make up for the round's cost, and the constant acceptance that gives them."""
    if row.break_even_tau is None:
        return NOTHING
    chance = (
        "no acceptance is enough" if row.break_even_chance is None else f"{row.break_even_chance:.2f} at each depth"
    )
    return f"{row.break_even_tau:.2f} ({chance})"


def peak(row: Row) -> str:
    """GiB; of each device by itself where there are several."""
    if row.peak_by_device:
        return "; ".join(f"{device} {number(gib(size), 3)}" for device, size in row.peak_by_device.items())
    return number(gib(row.peak_bytes), 3)


def memory(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Peak memory by what holds it, GiB; one dict a row that tells it, header to text."""
    told = [(row, row.memory) for _, group in grouped(rows) for row in group if row.memory is not None]
    names = list(dict.fromkeys(name for _, each in told for name in each.parts))
    return [
        {
            "method": method(row),
            "bits": target_name(row.cell, [other.cell for other in rows]),
            "peak": number(gib(each.peak_bytes), 3),
            **{name: number(gib(each.parts.get(name)), 3) for name in names},
            "unattributed": number(gib(each.unattributed_bytes), 3) + " (more than 2 %)" * (not each.adds_up),
        }
        for row, each in told
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A GitHub table, and under it what failed and why; what could be markup in a label stays text."""
    records = table(rows)
    if not records:
        return "No cells.\n"
    headers = list(records[0])
    rule = ["---:" if header in NUMERIC else "---" for header in headers]
    lines = [[markdown_text(text) for text in each.values()] for each in records]
    below = "".join(f"- {markdown_text(line)}\n" for line in failures(rows))
    return "".join(f"| {' | '.join(line)} |\n" for line in (headers, rule, *lines)) + ("\n" + below if below else "")


def rich_table(rows: Sequence[Row]) -> ByTarget:
    """For the terminal: print it with rich."""
    return ByTarget(tuple(rows))


@dataclass(frozen=True)
class ByTarget:
    """A table a target, as wide as the terminal allows: a narrow one leaves columns out rather than cut figures."""

    rows: tuple[Row, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        from reports import rounds

        yield from (_terminal_table(target, group, options.max_width) for target, group in grouped(self.rows))
        yield from rounds.rich_tables(self.rows)
        yield from map(Text, failures(self.rows))


def _terminal_table(target: str, group: Sequence[Row], width: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    mark = " SYNTHETIC" * any(row.synthetic for row in group)
    shown = Table(title=f"\n{target}{mark}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    records = [_terminal_record(row) for row in group]
    dropped = [] if width >= WIDE_COLUMNS else ["accepted\nby depth", "peak\nGiB"]
    dropped += [] if any(row.places for row in group) else ["rank"]
    headers = [header for header in records[0] if header not in dropped]
    longest = max(len(each["method"]) for each in records)
    shown.add_column("method", overflow="fold", min_width=min(longest, 20))
    for header in headers[1:]:
        words = header in ("accepted\nby depth", "identical?")
        shown.add_column(header, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row, each in zip(group, records, strict=True):
        shown.add_row(*(Text(each[header], "bold" if row.is_baseline else "") for header in headers))
    return shown


def _terminal_record(row: Row) -> dict[str, str]:
    word = side_of_one(row.speedup) if row.speedup else ""
    word = "unclear" if word == "no clear difference" else word
    return {
        "method": plain(row.cell.label),
        "tok/s": number(row.decode_tokens_per_second, 1),
        "speed-up": f"{times(row.speedup.value)} {word}" if row.speedup else NOTHING,
        "95 %": span(row.speedup).strip("()").replace(" to ", "-"),
        "rank": row.places,
        "τ": number(row.tau, 2),
        **({"break-\neven τ": number(row.break_even_tau, 2)} if row.synthetic else {}),
        "accepted\nby depth": acceptance(row, depths=3).replace("0.", "."),
        "peak\nGiB": peak(row),
        "tok/s\nper GiB": number(row.tokens_per_second_per_gib, 1),
        "identical?": _short_verdict(row),
    }


def _short_verdict(row: Row) -> str:
    if not row.trials_ok:
        return outcomes(row)
    told = row.verdict
    words = {
        "diverged": "DIVERGED",
        "near_tie": "near-tie",
        "differs": "DIFFERS",
        "near_tie_not_excluded": "differs",
        "not_testable": "untestable",
    }
    words |= {"lossy_by_design": "lossy", "no_pairs": NOTHING}
    if told.kind == "drawn":
        return "SYNTHETIC"
    return words.get(told.kind, told.kind) + (f" {told.differing}/{told.answers}" if told.differing else "")


def grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by target, in the plan's order; in a target the fastest first, the baseline where its speed puts it."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.cell.target, []).append(row)
    cells = [row.cell for row in rows]
    return [
        (target_name(group[0].cell, cells), sorted(group, key=lambda row: -(row.decode_tokens_per_second or -math.inf)))
        for group in groups.values()
    ]


def target_name(cell: Cell, among: Sequence[Cell]) -> str:
    """Bits, and of dtype, weights, runtime, device and model what tells this target from the others."""
    parts = [bits_name(cell.bits)]
    if len({other.dtype for other in among if other.bits == cell.bits}) > 1:
        parts.append(cell.dtype)
    if cell.weights != "base":
        parts.append(f"weights {cell.weights}")
    parts += [
        str(getattr(cell, name))
        for name in ("runtime", "device", "model")
        if len({getattr(other, name) for other in among}) > 1
    ]
    if len({other.context for other in among}) > 1:
        parts.append("prompts as they are" if cell.context is None else f"{cell.context:,} tokens of context")
    return plain(", ".join(parts))


def bits_name(bits: str) -> str:
    """`16 bits`; a quantised target keeps its identity: `8 bits (int8:t6)`."""
    if bits.isdigit():
        return f"{bits} bits"
    return {"int8": "8 bits", "nf4": "4 bits"}.get(bits.partition(":")[0], "bits") + f" ({plain(bits)})"


def method(row: Row) -> str:
    notes = ["baseline"] * row.is_baseline + ["SYNTHETIC"] * row.synthetic
    if row.trials_failed or not row.trials_ok:
        notes.append(failed(row))
    return plain(row.cell.label) + (f" ({'; '.join(notes)})" if notes else "")


def outcomes(row: Row) -> str:
    """What became of the trials that gave no number."""
    return ", ".join(outcome for outcome in row.outcomes if outcome != "ok") or "not measured"


def failed(row: Row) -> str:
    """`1 of 4 failed: oom`; of a cell with nothing to show, what became of it."""
    if not row.trials_ok:
        return outcomes(row)
    return f"{row.trials_failed} of {row.trials_ok + row.trials_failed} failed: {outcomes(row)}"


def failures(rows: Sequence[Row]) -> list[str]:
    """A sentence for each way in which a cell's trials failed."""
    return [
        plain(
            f"{row.cell.label} in {target}: {failure.outcome}, {failure.trials} of "
            f"{row.trials_ok + row.trials_failed} trials: {failure.reason or 'no reason recorded'}"
        )
        for target, group in grouped(rows)
        for row in group
        for failure in row.failures
    ]


def speedup(row: Row) -> str:
    if row.is_baseline:
        return "1 by definition"
    if row.speedup is None:
        return NOTHING
    return f"{times(row.speedup.value)} {span(row.speedup)} {direction(row.speedup)}".replace(f" {NOTHING} ", " ")


def direction(interval: Interval) -> str:
    """The word beside a speed-up."""
    return side_of_one(interval) + " (one round: no interval)" * (interval.low is None or interval.high is None)


def side_of_one(interval: Interval) -> str:
    """What reads as 1.00 is neither faster nor slower, however sure that is."""
    low, high = (interval.value if end is None else end for end in (interval.low, interval.high))
    return "faster" if round(low, 2) > 1 else "slower" if round(high, 2) < 1 else "no clear difference"


def span(interval: Interval | None) -> str:
    if interval is None or interval.low is None or interval.high is None:
        return NOTHING
    return f"({interval.low:.2f} to {interval.high:.2f})"


def acceptance(row: Row | CategoryLine, depths: int = 5) -> str:
    shares = [number(depth.probability, 2) for depth in row.acceptance]
    return " ".join(shares[:depths] + ["…"] * (len(shares) > depths)) or NOTHING


def verdict(row: Row) -> str:
    if not row.trials_ok:
        return outcomes(row)
    told: Verdict = row.verdict
    if told.kind == "reference" and told.differing:
        return f"reference; {told.differing} of {told.answers} answers differ between its own rounds"
    position = None if told.first_position is None else told.first_position + 1
    precise = f"; in 32 bits: {told.at_32_bits.replace('_', ' ')}" if told.at_32_bits else ""
    margin = None if told.margin is None else f"{told.margin:.2g}"
    words = _VERDICTS[told.kind].format(
        answers=told.answers, differing=told.differing, position=position, bits=plain(row.cell.bits), margin=margin
    )
    return words + precise


def warnings(run: Run, rows: Sequence[Row]) -> list[str]:
    """What to beware of: as the run recorded it, and what its files show."""
    lines = list(run.manifest.warnings)
    if run.skipped_lines:
        torn = "1 line" if run.skipped_lines == 1 else f"{run.skipped_lines} lines"
        are = "is" if run.skipped_lines == 1 else "are"
        lines.append(f"{torn} of trials.jsonl could not be read and {are} not in any number here.")
    if count := sum(row.trials_failed for row in rows):
        lines.append(f"{count} trial{'s' * (count != 1)} failed: counted nowhere and listed under the table.")
    lines += throttled(run)
    if missing := run.missing_trials:
        of = f"{missing} of {run.planned_trials} planned trials"
        lines.append(f"{of} are missing: the run was cut short; run it again to resume.")
    if run.manifest.isolation != "round":
        lines.append(
            f"Rounds shared a process (isolation: {run.manifest.isolation}): intervals over rounds miss what a fresh "
            "start would vary."
        )
    return lines + [plain(line) for line in doubts(run, rows)]


def throttled(run: Run) -> list[str]:
    """A warning where the device's clocks were lowered around some trial."""
    reasons: list[set[str]] = []
    for trial in run.rows:
        states = (trial.device_before, trial.device_after)
        reasons.append({reason for state in states if state for reason in state.throttle_reasons or ()})
    hit = [each for each in reasons if each]
    if not hit:
        return []
    named = plain(", ".join(sorted(set().union(*hit))))
    return [
        f"The device was throttled around {len(hit)} of {len(reasons)} trials ({named}): it ran slower than it can, "
        "and unevenly. Cool it, raise its power limit, or lock its clocks, and measure again."
    ]


def pareto(rows: Sequence[Row]) -> set[str]:
    """Ids of the cells that no other of the same runtime, device and context beats in both speed and peak memory."""
    front: set[str] = set()
    fastest: dict[tuple[str, str, int | None], float] = {}
    known = [row for row in rows if row.tokens_per_second_per_gib is not None]
    for row in sorted(known, key=lambda row: (row.peak_bytes or 0, -(row.decode_tokens_per_second or 0))):
        speed = row.decode_tokens_per_second or 0.0
        rivals = (row.cell.runtime, row.cell.device, row.cell.context)
        if speed > fastest.get(rivals, 0.0):
            fastest[rivals] = speed
            front.add(row.cell.id)
    return front


def number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def times(value: float) -> str:
    return f"{value:.2f}\N{MULTIPLICATION SIGN}"


def gib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / GIB


def scaled(value: float | None, factor: float, digits: int) -> str:
    return NOTHING if value is None else number(value * factor, digits)


def plain(text: str) -> str:
    """Text from a file, without what a terminal or a table could take for a command."""
    return "".join(char if char.isprintable() else " " for char in text)


def markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)
