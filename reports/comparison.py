"""A comparison as people and machines read it: table, Markdown, JUnit XML, and JSON for two services that keep charts.

The JSON files hold NEW's own figures: github-action-benchmark takes one file for what shall grow and one for what shall
shrink, Bencher one for all (its Metric Format).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from harness.compare import CellComparison, Comparison
from harness.gates import METRICS, Change, between, percent
from reports.tables import NOTHING, markdown_text, plain

MARKS = {"ok": "ok", "regressed": "REGRESSED", "not judged": "not judged"}


def verdict(comparison: Comparison) -> str:
    """The one line on top."""
    count = len(comparison.regressed)
    if count:
        return f"{count} of {len(comparison.judgements)} checks regressed"
    skipped = sum(judgement.status == "not judged" for judgement in comparison.judgements)
    rest = f"; {skipped} could not be judged" if skipped else ""
    return f"no regression in {len(comparison.judgements) - skipped} checks{rest}"


def figures(comparison: Comparison) -> Iterator[tuple[CellComparison, Change, list[str]]]:
    """Each cell's changes, and [metric, base, new, change] in words."""
    for cell in comparison.cells:
        for name, change in cell.changes.items():
            yield cell, change, [name, amount(name, change.base), amount(name, change.new), difference(change)]


def amount(metric: str, value: float) -> str:
    if metric.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,.3f}" if value < 100 else f"{value:,.1f}"


def difference(change: Change) -> str:
    if change.change is None:
        return "not compared"
    interval = change.change
    sure = between(interval) or (" (exact)" if interval.low is not None else " (no interval)")
    return f"{percent(interval.value - 1)}{sure}"


def reasons(comparison: Comparison) -> list[str]:
    """Sentences: why absolute figures were left out, and what else to know."""
    left_out = [f"Absolute figures are not compared: {plain(reason)}." for reason in comparison.unlike]
    return left_out + [plain(note) + "." for note in comparison.notes]


def show(comparison: Comparison) -> None:
    """On the terminal: the figures, the gates, and what to know."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("", "base", "new", "change (95 %)"):
        table.add_column(header, justify="right" if header else "left", overflow="fold")
    last = ""
    for cell, _, words in figures(comparison):
        if cell.id != last:
            table.add_row(Text(plain(f"{cell.label} in {cell.bits}"), "bold"))
        table.add_row(*map(Text, (f"  {words[0]}", *words[1:])))
        last = cell.id
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table, soft_wrap=False)
    styles = {"regressed": "bold red", "not judged": "yellow", "ok": "green"}
    for status, line in gathered(comparison):
        console.print(Text(line, styles[status]))
    for line in reasons(comparison):
        console.print(Text(line, "yellow"))
    console.print(verdict(comparison))


def gathered(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """(status, line): a line for what regressed in a cell; the rest by gate, and what was not judged by its reason."""
    rest: dict[tuple[str, str, str], int] = {}
    for one in comparison.judgements:
        if one.status == "regressed":
            yield one.status, plain(f"REGRESSED: {one.cell}: {one.gate}: {one.reason}")
        else:
            key = (one.status, one.gate, one.reason if one.status == "not judged" else "")
            rest[key] = rest.get(key, 0) + 1
    for (status, gate, reason), count in rest.items():
        where = f"{count} cell{'s' * (count != 1)}"
        yield status, plain(f"{status}: {gate}: {where}" + (f": {reason}" if reason else ""))


def markdown(comparison: Comparison) -> str:
    """For a comment under a pull request."""
    lines = [f"### Speculative decoding: {verdict(comparison)}", ""]
    lines += ["| | method | check | |", "|---|---|---|---|"]
    for one in comparison.judgements:
        mark = f"**{MARKS[one.status]}**" if one.status == "regressed" else MARKS[one.status]
        lines.append(f"| {mark} | {_md(one.cell)} | `{one.gate}` | {_md(one.reason)} |")
    lines += ["", "<details><summary>Figures</summary>", ""]
    lines += ["| method | bits | metric | base | new | change (95 %) |", "|---|---|---|---:|---:|---:|"]
    for cell, _, words in figures(comparison):
        lines.append(f"| {' | '.join([_md(cell.label), _md(cell.bits), f'`{words[0]}`', *words[1:]])} |")
    lines += ["", "</details>", ""]
    lines += [f"- {_md(line)}" for line in reasons(comparison)]
    return "\n".join(lines).rstrip() + "\n"


def _md(text: str) -> str:
    return markdown_text(plain(text)) or NOTHING


def junit(comparison: Comparison) -> str:
    """One suite; a case a check. What could not be judged is skipped, with the reason."""
    counts = {status: sum(one.status == status for one in comparison.judgements) for status in MARKS}
    suite = ElementTree.Element(
        "testsuite",
        name="harness compare",
        tests=str(len(comparison.judgements)),
        failures=str(counts["regressed"]),
        errors="0",
        skipped=str(counts["not judged"]),
    )
    for one in comparison.judgements:
        case = ElementTree.SubElement(suite, "testcase", classname=plain(one.cell), name=one.gate)
        if one.status == "regressed":
            ElementTree.SubElement(case, "failure", message=plain(one.reason))
        elif one.status == "not judged":
            ElementTree.SubElement(case, "skipped", message=plain(one.reason))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def action_benchmark(comparison: Comparison, better: str) -> str:
    """NEW's figures for github-action-benchmark: `more` for customBiggerIsBetter, `less` for customSmallerIsBetter."""
    entries = [
        {
            "name": f"{cell.id}: {change.metric}",
            "unit": METRICS[change.metric].unit,
            "value": change.new,
            "extra": f"{METRICS[change.metric].meaning}; change: {difference(change)}",
        }
        for cell, change, _ in figures(comparison)
        if METRICS[change.metric].better == better
    ]
    return json.dumps(entries, indent=2) + "\n"


def bencher(comparison: Comparison) -> str:
    """NEW's figures in Bencher's Metric Format: benchmark, measure, value."""
    found: dict[str, dict[str, Any]] = {}
    for cell, change, _ in figures(comparison):
        found.setdefault(cell.id, {})[change.metric.replace("_", "-")] = {"value": change.new}
    return json.dumps(found, indent=2) + "\n"


FILES: dict[str, Callable[[Comparison], str]] = {
    "comparison.md": markdown,
    "junit.xml": junit,
    "benchmark-bigger.json": lambda comparison: action_benchmark(comparison, "more"),
    "benchmark-smaller.json": lambda comparison: action_benchmark(comparison, "less"),
    "bencher.json": bencher,
}


def write(comparison: Comparison, directory: Path) -> list[Path]:
    """All the files, into `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in FILES.items():
        (directory / name).write_text(make(comparison), encoding="utf-8")
    return [directory / name for name in FILES]
