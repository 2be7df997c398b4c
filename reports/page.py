"""One self-contained HTML page from result files: nothing is loaded, every text is escaped.

Charts are drawn to SVG here. The page's own style and script are the only ones that its content-security policy allows,
by their hashes, so it can be e-mailed, archived and printed, and what a model wrote can never run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
from markupsafe import Markup, escape

from harness.metrics import REPEAT_NGRAM, Row, summary
from harness.results import Run
from harness.stats import PROMPTS_LIKE_THESE, THESE_PROMPTS, Interval
from reports import certainty, charts, draw, leaderboard, parts, rounds, tables, texts, words

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Figure:
    svg: Markup
    takeaway: str


@dataclass(frozen=True)
class Strip:
    """A speed-up's interval as percentages of a cell's width, on a ratio scale shared by the page."""

    low: float
    width: float
    point: float
    one: float

    @property
    def gain(self) -> tuple[float, float]:
        """(left, width) of the bar from no change to the value."""
        return min(self.one, self.point), round(abs(self.point - self.one), 1)


def render(runs: Sequence[Run], summaries: Sequence[list[Row]] | None = None) -> str:
    """The page as HTML. Each run has a part of its own; several also share a leaderboard, as far as they are alike.

    `summaries` is what `summary` says of each run, where the caller knows it already.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["ticked"] = ticked
    known = [summary(run) for run in runs] if summaries is None else summaries
    views = [view(run, rows, f"r{index}") for index, (run, rows) in enumerate(zip(runs, known, strict=True))]
    return environment.get_template("page.html.j2").render(
        runs=views,
        boards=leaderboard.boards(runs, known),
        title="; ".join(
            f"{'SYNTHETIC: ' * one['synthetic']}{one['manifest'].model} on {one['device']}" for one in views
        ),
        t=tables,
        rounds=rounds,
        these=THESE_PROMPTS,
        like=PROMPTS_LIKE_THESE,
        ngram=REPEAT_NGRAM,
        most_trials=texts.MOST_TRIALS,
        most_tokens=texts.MOST_TOKENS,
        style=asset("page.css"),
        script=asset("page.js"),
        policy=policy(),
    )


def write(runs: Sequence[Run], path: Path, summaries: Sequence[list[Row]] | None = None) -> Path:
    """Write the page, whole or not at all; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(render(runs, summaries), encoding="utf-8")
    os.replace(partial, path)
    return path


def policy(*, scripted: bool = True) -> str:
    """Only this program's own style, and script where there is one, and nothing from anywhere."""
    allowed = {"style-src": "page.css"} | ({"script-src": "page.js"} if scripted else {})
    hashes = {kind: hashlib.sha256(asset(name).encode()).digest() for kind, name in allowed.items()}
    told = "; ".join(f"{kind} 'sha256-{base64.b64encode(digest).decode()}'" for kind, digest in hashes.items())
    return f"default-src 'none'; {told}; base-uri 'none'; form-action 'none'"


def ticked(text: str) -> Markup:
    """What stands between backticks, as code; all of it escaped."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


@cache
def asset(name: str) -> Markup:
    # Safe as markup: a file of this package. Line ends as the browser will hash them.
    return Markup((HERE / name).read_text(encoding="utf-8"))


def view(run: Run, rows: list[Row], name: str) -> dict[str, Any]:
    """What the template shows of one run; `name` keeps the ids of several runs apart."""
    good = parts.good_trials(run)
    pictures = figures(run, rows, name)
    answers = texts.answers(run)
    where = words.device(run)
    strip = _strips([row.speedup for row in rows if row.speedup])
    groups = tables.grouped(rows)
    return pictures | {
        "name": name,
        "manifest": run.manifest,
        "rounds": run.measured_rounds,
        "device": where,
        "rows": rows,
        "groups": groups,
        "pareto": tables.pareto(rows),
        "by_category": {row.cell.id: parts.by_category(good.get(row.cell.id, []), row) for row in rows},
        "filters": _filters(run, rows),
        "strips": {row.cell.id: strip(row.speedup) for row in rows if row.speedup},
        "synthetic": any(row.synthetic for row in rows),
        "answers": words.sentences(run, rows),
        "against_itself": words.against_itself(rows),
        "contents": _contents(pictures),
        "changed_targets": words.changed_targets(run),
        "certainty": list(certainty.lines(run, rows)),
        "training_seconds": words.training_seconds,
        "peaks": sorted({row.peak_kind for row in rows if row.peak_bytes}),
        "token_view": texts.token_view(run, rows, answers),
        "verdicts": [(target, row) for target, group in groups for row in group if row.trials_ok],
        "divergences": texts.divergences(rows, answers),
        "host": dict(_flat(run.manifest.host)),
        "plan": _plan(run),
        "warnings": tables.warnings(run, rows),
    }


Drawn = tuple[str, alt.TopLevelMixin | None, Callable[[], str]]
"title, chart, the line that says what it shows"


def drawings(run: Run, rows: Sequence[Row]) -> tuple[dict[str, Drawn], dict[str, parts.Bars]]:
    """(charts by name, what the stacked ones are made of)."""
    bars = parts.stacks(rows)
    training = run.manifest.training
    return {
        "scatter": ("Decode speed against peak memory", charts.scatter(rows), lambda: words.scatter_line(rows)),
        "categories": ("Speed-up by category", charts.categories(rows), lambda: words.category_line(rows)),
        "phases": (
            "Where a pass's time goes",
            charts.stack(bars["phases"], "a pass, ms"),
            lambda: words.phases_line(bars["phases"]),
        ),
        "memory": (
            "Peak memory by its parts",
            charts.stack(bars["memory"], "peak memory, GiB"),
            lambda: words.memory_line(bars["memory"]),
        ),
        "acceptance": ("Acceptance by depth", charts.acceptance(rows), lambda: words.acceptance_line(rows)),
        "tau": ("Speed-up against tokens per pass", charts.tau(rows), lambda: words.tau_line(rows)),
        "training": (
            "Speed-up against training seconds",
            charts.training(training, rows),
            lambda: words.training_line(training, rows),
        ),
    }, bars


def figures(run: Run, rows: Sequence[Row], name: str) -> dict[str, Any]:
    """The charts as inline SVG, None where there is nothing to draw, and their legends."""
    drawn, bars = drawings(run, rows)

    def figure(kind: str, title: str, chart: alt.TopLevelMixin | None, takeaway: Callable[[], str]) -> Figure | None:
        if chart is None:
            return None
        mark = "SYNTHETIC: " * any(row.synthetic for row in rows)
        title, line = mark + title, mark + takeaway()
        # Safe as markup: draw.svg parsed it as XML and wrote it out again, so every text in it is escaped.
        return Figure(Markup(draw.svg(chart, f"{name}-{kind}", title, line)), line)

    def legend(names: Sequence[str], glyphs: Sequence[str]) -> list[tuple[str, str, int]]:
        return [(name, glyphs[index % len(glyphs)], index % len(glyphs)) for index, name in enumerate(names)]

    squares = ["■"] * len(draw.PARTS)
    return {kind: figure(kind, *each) for kind, each in drawn.items()} | {
        "legend": legend(charts.targets(rows), draw.GLYPHS),
        "phase_legend": legend(charts.part_names(bars["phases"]), squares),
        "memory_legend": legend(charts.part_names(bars["memory"]), squares),
    }


CONTENTS = {
    "results": "Results",
    "memory-speed": "Speed against memory",
    "categories": "Categories",
    "time": "Where time goes",
    "memory": "Memory",
    "acceptance": "Acceptance",
    "tau": "τ and speed-up",
    "training": "Training",
    "texts": "Texts",
    "lossless": "Losslessness",
    "host": "Host and plan",
}


def _contents(pictures: Mapping[str, Any]) -> list[tuple[str, str]]:
    absent = {anchor for anchor, kind in (("time", "phases"), ("memory", "memory")) if pictures[kind] is None}
    return [(anchor, heading) for anchor, heading in CONTENTS.items() if anchor not in absent]


def _filters(run: Run, rows: Sequence[Row]) -> dict[str, list[str]]:
    """What the table can be cut down to, where there is a choice."""
    choices = {
        "bits": [tables.bits_name(row.cell.bits) for row in rows],
        "runtime": [row.cell.runtime for row in rows],
        "category": [trial.category for trial in run.rows if trial.outcome == "ok"],
    }
    return {name: list(dict.fromkeys(found)) for name, found in choices.items() if len(set(found)) > 1}


def _strips(intervals: Sequence[Interval]) -> Callable[[Interval], Strip]:
    values = [each.value for each in intervals]
    least, most = min([0.8, *values]) / charts.WIDEST, max([1.25, *values]) * charts.WIDEST
    ends = [end for each in intervals for end in (each.value, each.low, each.high) if end]
    low, high = math.log(max(min([0.8, *ends]), least)), math.log(min(max([1.25, *ends]), most))

    def at(value: float) -> float:
        return min(max(round(100 * (math.log(value) - low) / (high - low), 1), 0.0), 100.0)

    def strip(interval: Interval) -> Strip:
        left, right = at(interval.low or interval.value), at(interval.high or interval.value)
        return Strip(left, round(right - left, 1), at(interval.value), at(1.0))

    return strip


def _plan(run: Run) -> dict[str, str]:
    m = run.manifest
    return {
        "cells": f"{len(m.cells)} in {m.rounds} round{'s' * (m.rounds != 1)}",
        "isolation": f"{m.isolation}; executor: {m.executor}",
        "prompts": f"{m.prompts} from {m.prompt_set}, up to {m.turns} turn{'s' * (m.turns != 1)}",
        "length": f"at most {m.max_new_tokens} new tokens",
        "sampling": "greedy" if m.temperature == 0 else f"temperature {m.temperature:g}, top-p {m.top_p:g}",
        "chat template": "none (raw)" if m.raw else "the model's",
        "system prompt": m.system or "none",
        "seed": str(m.seed),
        "created": m.created,
        "command": " ".join(m.command),
        "weights SHA-256": m.weights_sha256 or "not recorded",
        "prompt set SHA-256": m.prompt_set_sha256,
        "first answers SHA-256": m.first_answers_sha256 or "none needed",
        "schema": str(m.schema),
    }


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested host facts as dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
