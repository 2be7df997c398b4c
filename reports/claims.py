"""A run beside published figures: first in which settings they differ, then the numbers.

Only where every stated setting is the same does a difference of the numbers mean anything, and only then is it judged.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.errors import UserError
from harness.metrics import Row
from harness.results import Run
from harness.stats import Interval
from reports.tables import grouped, method, number, plain
from reports.words import device

Range = float | tuple[float, float]
SETTINGS = ("model", "device", "bits", "dtype", "runtime", "sampling", "batch", "prompts", "context", "new tokens")
UNSTATED = "not stated"


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One method in one source."""

    method: str
    "of this program; a method that it lacks stands in no comparison"
    name: str
    "as the source calls it"
    tree: str | None = None
    "`tree` or `chain`"
    speedup: Range | None = None
    tau: Range | None = None
    ratio: Range | None = None
    "speed over that of the method `to` in `to_bits`"
    bits: str | None = None
    to: str | None = None
    to_bits: str | None = None


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: str
    where: str
    settings: dict[str, str]
    figures: tuple[Figure, ...]


class _Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: tuple[Source, ...]


@dataclass(frozen=True)
class Beside:
    """A published number, and the run's."""

    row: Row
    target: str
    name: str
    kind: str
    published: Range
    here: Interval
    differs: tuple[str, ...]
    "in what this method's settings differ beyond the source's"


@dataclass(frozen=True)
class Claim:
    """One source, for the cells of the run that it speaks of."""

    source: Source
    differs: tuple[str, ...]
    besides: tuple[Beside, ...]

    def judged(self, beside: Beside) -> str:
        """Whether the numbers agree, which only like settings can tell."""
        if self.differs or beside.differs:
            return "other settings"
        low, high = _ends(beside.published)
        if beside.here.low is None or beside.here.high is None:
            return "no interval"
        return "agrees" if beside.here.low <= high and beside.here.high >= low else "DIFFERS"


def published() -> tuple[Source, ...]:
    text = (Path(__file__).parent / "claims.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), _Published).source


def compare(run: Run, rows: Sequence[Row], sources: Sequence[Source] | None = None) -> list[Claim]:
    """The sources that speak of a method of this run. Raises UserError where none does."""
    claims = []
    for source in published() if sources is None else sources:
        besides = tuple(_besides(source, rows))
        if besides:
            cells = [one.row for one in besides]
            claims.append(Claim(source, tuple(_differences(_settings(run, cells), source.settings)), besides))
    if not claims and rows and all(row.decode_tokens_per_second is None for row in rows):
        raise UserError("no trial of this run was finished: measure it again, and then compare")
    if not claims:
        raise UserError("no published figure is known of a method in this run: measure eagle, medusa or s3d")
    return claims


def _besides(source: Source, rows: Sequence[Row]) -> Iterator[Beside]:
    for figure in source.figures:
        for target, group in grouped(rows):
            for row in group:
                if row.cell.method != figure.method or (figure.bits and row.cell.bits != figure.bits):
                    continue
                own = _tree(row)
                tree = (
                    (f"draft: a {own} here, a {figure.tree} there",) if own and figure.tree not in (None, own) else ()
                )
                for kind, value, here in _numbers(figure, row, rows):
                    if here is not None:
                        yield Beside(row, target, figure.name, kind, value, here, tree)


def _numbers(figure: Figure, row: Row, rows: Sequence[Row]) -> Iterator[tuple[str, Range, Interval | None]]:
    if figure.speedup is not None:
        yield "speed-up", figure.speedup, row.speedup
    if figure.tau is not None:
        yield "τ", figure.tau, None if row.tau is None else Interval(row.tau, None, None, "")
    if figure.ratio is not None:
        for other in rows:
            to = other.cell.method == figure.to and other.cell.bits.partition(":")[0] == figure.to_bits
            speeds = row.decode_tokens_per_second, other.decode_tokens_per_second
            if to and speeds[0] and speeds[1]:
                label = plain(other.cell.label)
                yield f"speed over {label}", figure.ratio, Interval(speeds[0] / speeds[1], None, None, "")


def _settings(run: Run, rows: Sequence[Row]) -> dict[str, str]:
    """How the run was made, in the words of the table of published figures."""
    m = run.manifest
    contexts = dict.fromkeys(f"{row.cell.context:,} tokens" for row in rows if row.cell.context is not None)
    return {
        "model": m.model,
        "device": device(run),
        "bits": ", ".join(dict.fromkeys(row.cell.bits for row in rows)),
        "dtype": ", ".join(dict.fromkeys(row.cell.dtype for row in rows)),
        "runtime": ", ".join(dict.fromkeys(row.cell.runtime for row in rows)),
        "sampling": "greedy" if m.temperature == 0 else f"temperature {m.temperature:g}",
        "batch": ", ".join(dict.fromkeys(str(row.cell.batch_size) for row in rows)),
        "prompts": m.prompt_set,
        "new tokens": str(m.max_new_tokens),
    } | ({"context": ", ".join(contexts)} if contexts else {})


def _differences(here: dict[str, str], there: dict[str, str]) -> Iterator[str]:
    """What is not the same, or not known to be."""
    for name in (name for name in SETTINGS if name in here):
        if here[name] != there.get(name):
            yield plain(f"{name}: {here[name]} here, {there.get(name, UNSTATED)} there")


def _tree(row: Row) -> str | None:
    """What a cell drafts, as far as its options tell; None for a method without a choice."""
    nodes = row.cell.options.get("nodes")
    if nodes is None:
        return "chain" if row.cell.method in ("prompt-lookup", "draft-model", "layerskip") else None
    return "tree" if nodes else "chain"


def _ends(value: Range) -> tuple[float, float]:
    return (value, value) if isinstance(value, float) else value


# --- in the terminal --------------------------------------------------------------------------------------------------


def show(claims: Sequence[Claim]) -> None:
    """For each source what differs, and then the numbers side by side."""
    console = Console(highlight=False, markup=False)
    for claim in claims:
        console.print(Text(f"\n{claim.source.title}, {claim.source.where}", "bold"), soft_wrap=True)
        if claim.differs:
            console.print("Settings that differ, or are not known to be the same:")
            for line in claim.differs:
                console.print(f"  {line}", soft_wrap=True)
        else:
            console.print("The stated settings are the same.")
        console.print(_table(claim))
    console.print(
        "\nA speed-up belongs to its machine, model, runtime and prompts: where these differ, unequal numbers "
        "contradict nothing. Tokens per round (τ) carry over between machines, not between models or prompts."
    )


def _table(claim: Claim) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("method", "published as", "published", "here", ""):
        table.add_column(header, overflow="fold")
    lines: dict[tuple[str, str], list[Beside]] = {}
    for one in claim.besides:
        lines.setdefault((f"{method(one.row)}, {one.target}", one.name), []).append(one)
    for names, besides in lines.items():
        told = (", ".join(f"{one.kind} {_range(one.published)}" for one in besides), ", ".join(map(_here, besides)))
        judged = dict.fromkeys(note for one in besides for note in (claim.judged(one), *one.differs))
        table.add_row(*map(Text, (*names, *told, "; ".join(judged))))
    return table


def _range(value: Range) -> str:
    low, high = _ends(value)
    return number(low, 2) if low == high else f"{number(low, 2)} to {number(high, 2)}"


def _here(beside: Beside) -> str:
    low, high = beside.here.low, beside.here.high
    sure = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{beside.kind} {number(beside.here.value, 2)}{sure}"


def as_json(claims: Sequence[Claim]) -> str:
    """One object a source, in one line."""
    return msgspec.json.encode([_record(claim) for claim in claims]).decode()


def _record(claim: Claim) -> dict[str, Any]:
    return {
        "source": claim.source.title,
        "where": claim.source.where,
        "settings_that_differ": claim.differs,
        "figures": [
            {
                "method": one.row.cell.label,
                "bits": one.row.cell.bits,
                "published_as": one.name,
                "figure": one.kind,
                "published": one.published,
                "here": one.here.value,
                "low": one.here.low,
                "high": one.here.high,
                "also_differs": one.differs,
                "judged": claim.judged(one),
                "synthetic": one.row.synthetic,
            }
            for one in claim.besides
        ],
    }
