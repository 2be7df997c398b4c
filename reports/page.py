"""One self-contained HTML page from result files: no script, no network, every text escaped.

Charts are drawn to SVG here, so the page obeys `default-src 'none'` and can be e-mailed, archived and printed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
from markupsafe import Markup

from harness.metrics import REPEAT_NGRAM, Row, summary
from harness.results import Run, Trial
from harness.stats import PROMPTS_LIKE_THESE, THESE_PROMPTS, Interval
from reports import certainty, charts, tables, words

TOKEN_VIEW_PROMPTS = 4


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


@dataclass(frozen=True)
class Pass:
    """Tokens that entered the text together; pass 0 is the prompt's own, which gives the first token."""

    number: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Answer:
    label: str
    note: str
    passes: tuple[Pass, ...]
    text: str
    "the whole text, for a file that does not hold the text of each token"


@dataclass(frozen=True)
class PromptView:
    title: str
    answers: tuple[Answer, ...]


def render(runs: Sequence[Run]) -> str:
    """The page as HTML. Runs stay apart, each with its own tables: unlike hosts are never compared."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    views = [view(run, f"r{index}") for index, run in enumerate(runs)]
    return environment.get_template("template.html.j2").render(
        runs=views, t=tables, these=THESE_PROMPTS, like=PROMPTS_LIKE_THESE, ngram=REPEAT_NGRAM
    )


def write(run: Run) -> Path:
    """Write `report.html` into the run's directory, whole or not at all."""
    path = run.directory / "report.html"
    partial = path.with_name("report.html.partial")
    partial.write_text(render([run]), encoding="utf-8")
    os.replace(partial, path)
    return path


def view(run: Run, name: str) -> dict[str, Any]:
    """What the template shows of one run; `name` keeps the ids of several runs apart."""
    rows = summary(run)
    device = _device(run)
    strip = _strips([row.speedup for row in rows if row.speedup])

    def figure(kind: str, title: str, chart: alt.TopLevelMixin | None, takeaway: Callable[[], str]) -> Figure | None:
        if chart is None:
            return None
        mark = "SYNTHETIC: " * any(row.synthetic for row in rows)
        title, line = mark + title, mark + takeaway()
        # Safe as markup: charts.svg parsed it as XML and wrote it out again, so every text in it is escaped.
        return Figure(Markup(charts.svg(chart, f"{name}-{kind}", title, line)), line)

    training = run.manifest.training
    return {
        "name": name,
        "manifest": run.manifest,
        "device": device,
        "rows": rows,
        "groups": tables.grouped(rows),
        "strips": {row.cell.id: strip(row.speedup) for row in rows if row.speedup},
        "synthetic": any(row.synthetic for row in rows),
        "answers": [*words.fitting(rows, run.manifest.vram_budget_bytes), *words.answers(rows, device)],
        "against_itself": words.against_itself(rows),
        "changed_targets": words.changed_targets(run),
        "certainty": list(certainty.lines(run, rows)),
        "scatter": figure(
            "scatter", "Decode speed against peak memory", charts.scatter(rows), lambda: words.scatter_line(rows)
        ),
        "acceptance": figure(
            "acceptance", "Acceptance by depth", charts.acceptance(rows), lambda: words.acceptance_line(rows)
        ),
        "categories": figure(
            "categories", "Speed-up by category", charts.categories(rows), lambda: words.category_line(rows)
        ),
        "training": figure(
            "training",
            "Held-out tau against training seconds",
            charts.training(training),
            lambda: words.training_line(training),
        ),
        "legend": [
            (name, charts.GLYPHS[index % len(charts.GLYPHS)], index % len(charts.GLYPHS))
            for index, name in enumerate(charts.targets(rows))
        ],
        "training_seconds": words.training_seconds,
        "peaks": sorted({row.peak_kind for row in rows if row.peak_bytes}),
        "token_view": token_view(run, rows),
        "host": dict(_flat(run.manifest.host)),
        "plan": _plan(run),
        "warnings": tables.warnings(run, rows),
    }


def token_view(run: Run, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The first prompts of the target that most methods finished; None where no trial has a text."""
    trials = {
        (t.cell.id, t.prompt_id, t.turn): t for t in reversed(run.rows) if t.outcome == "ok" and t.text is not None
    }
    groups = [
        (target, [row for row in group if any(key[0] == row.cell.id for key in trials)])
        for target, group in tables.grouped(rows)
    ]
    target, group = max(groups, key=lambda pair: len(pair[1]), default=("", []))
    ids = {row.cell.id for row in group}
    prompts = list(
        dict.fromkeys(
            (t.prompt_id, t.turn, t.category)
            for t in run.rows
            if (t.cell.id, t.prompt_id, t.turn) in trials and t.cell.id in ids
        )
    )
    if not prompts:
        return None
    views = []
    for prompt_id, turn, category in prompts[:TOKEN_VIEW_PROMPTS]:
        shown = [(row, trials.get((row.cell.id, prompt_id, turn))) for row in group]
        answers = tuple(_answer(row, trial) for row, trial in shown if trial)
        title = f"{prompt_id}, {category}" + (f", turn {turn + 1}" if run.manifest.turns > 1 else "")
        views.append(PromptView(tables.plain(title), answers))
    return {
        "target": target,
        "prompts": views,
        "left_out": len(prompts) - len(views),
        "other_targets": [name for name, _ in groups if name != target],
    }


def _answer(row: Row, trial: Trial) -> Answer:
    committed, texts = trial.committed or [], trial.token_texts
    tokens, count = len(trial.new_tokens or ()), len(committed)
    tau = f", τ {(tokens - 1) / count:.2f}" if count else ""
    passes: list[Pass] = []
    if texts:
        ends = [1]
        for size in committed:
            ends.append(ends[-1] + size)
        starts = [0, *ends[:-1]]
        passes = [
            Pass(number, end - start, "".join(texts[start:end]))
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
            if end > start
        ]
    return Answer(
        tables.plain(row.cell.label), f"{tokens} tokens in {count} passes{tau}", tuple(passes), trial.text or ""
    )


def _strips(intervals: Sequence[Interval]) -> Callable[[Interval], Strip]:
    ends = [end for each in intervals for end in (each.value, each.low, each.high) if end]
    low, high = math.log(min([0.8, *ends])), math.log(max([1.25, *ends]))

    def at(value: float) -> float:
        return round(100 * (math.log(value) - low) / (high - low), 1)

    def strip(interval: Interval) -> Strip:
        left, right = at(interval.low or interval.value), at(interval.high or interval.value)
        return Strip(left, round(right - left, 1), at(interval.value), at(1.0))

    return strip


def _device(run: Run) -> str:
    names = dict.fromkeys(trial.device_name for trial in run.rows if trial.device_name)
    return tables.plain(", ".join(names or dict.fromkeys(cell.device for cell in run.manifest.cells)) or "no device")


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
