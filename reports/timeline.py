"""The page of a history: tau, speed-up and memory over runs, with the steps marked. No script, nothing to load."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import altair as alt
import jinja2
import pandas as pd
from markupsafe import Markup

from harness.history import Series
from harness.steps import FEWEST_RUNS
from reports import draw
from reports.page import asset, policy
from reports.tables import plain

TITLES = {"tau": "τ, tokens per pass", "speedup": "speed-up over plain decoding", "peak_bytes": "peak memory, GiB"}
UNITS = {"peak_bytes": 2**-30}
WIDTH, HEIGHT = 900, 150


@dataclass(frozen=True)
class Change:
    """A step, in words."""

    commit: str
    before: str
    change: str


@dataclass(frozen=True)
class Panel:
    title: str
    note: str
    svg: Markup
    changes: tuple[Change, ...]


def write(found: Sequence[Series], path: Path) -> Path:
    """Write the page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(render(found), encoding="utf-8")
    os.replace(partial, path)
    return path


def render(found: Sequence[Series]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    groups = [
        (TITLES[metric], [panel(one, f"h{index}") for index, one in enumerate(found) if one.metric == metric])
        for metric in TITLES
    ]
    return environment.get_template("timeline.html.j2").render(
        groups=groups,
        runs=len({(point.run, point.created) for one in found for point in one.points}),
        synthetic=any(point.synthetic for one in found for point in one.points),
        fewest=FEWEST_RUNS,
        style=asset("page.css"),
        policy=policy(scripted=False),
    )


def panel(series: Series, name: str) -> Panel:
    steps = series.steps
    count = len(series.points)
    title = plain(f"{series.label} in {series.bits}" + (f" on {series.machine}" if series.machine else ""))
    note = f"{count} run{'s' * (count != 1)}"
    if count < FEWEST_RUNS:
        note += f"; steps are looked for from {FEWEST_RUNS} runs on"
    elif not steps:
        note += "; no step"
    changes = tuple(
        Change(commit(series, step.at), commit(series, step.at - 1), f"{100 * (step.change - 1):+.2f} %")
        for step in steps
    )
    return Panel(title, note, Markup(draw.svg(chart(series), name, title, note)), changes)


def commit(series: Series, index: int) -> str:
    """How a person finds the run: its commit, or its name."""
    point = series.points[index]
    if point.commit is None:
        return plain(point.run)
    return plain(point.commit[:9] + "+" * point.commit.endswith("+"))


def chart(series: Series) -> draw.Layered:
    factor = UNITS.get(series.metric, 1.0)
    data = pd.DataFrame(
        [
            {
                "run": index,
                "value": point.value * factor,
                "low": (point.low if point.low is not None else point.value) * factor,
                "high": (point.high if point.high is not None else point.value) * factor,
            }
            for index, point in enumerate(series.points)
        ]
    )
    labels = [commit(series, index) for index in range(len(data))]
    x = alt.X(
        "run:Q",
        title=None,
        axis=alt.Axis(
            values=list(range(0, len(data), max(1, len(data) // 12))),
            labelExpr=f"{labels!r}[datum.value]",
            labelAngle=-40,
            grid=False,
        ),
        scale=alt.Scale(domain=[-0.5, len(data) - 0.5], nice=False),
    )
    lowest, highest = float(data.low.min()), float(data.high.max())
    room = max(0.08 * (highest - lowest), 0.01 * highest)
    scale = alt.Scale(domain=[lowest - room, highest + room], nice=False, zero=False)
    y = alt.Y("value:Q", title=TITLES[series.metric], axis=alt.Axis(tickCount=5), scale=scale)
    base = alt.Chart(data)
    layers: list[alt.Chart] = [
        base.mark_rule(color=draw.SERIES[0], opacity=0.4).encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q"),
        base.mark_line(color=draw.SERIES[0], opacity=0.5).encode(x=x, y=y),
        base.mark_point(color=draw.SERIES[0], filled=True, size=36, opacity=1).encode(x=x, y=y),
    ]
    marks = pd.DataFrame(
        [{"run": step.at - 0.5, "text": f"{100 * (step.change - 1):+.1f} %"} for step in series.steps],
        columns=["run", "text"],
    )
    if len(marks):
        lines = alt.Chart(marks)
        layers.append(lines.mark_rule(color=draw.SERIES[1], strokeDash=[4, 3]).encode(x=x))
        layers.append(
            lines.mark_text(color=draw.INK, align="left", dx=4, fontSize=11).encode(x=x, y=alt.value(8), text="text:N")
        )
    return alt.layer(*layers, width=WIDTH, height=HEIGHT)
