"""Charts as Vega-Lite specs, drawn to SVG here so that the page carries no script.

Colour never stands alone: a target also has its own mark shape, a method its own panel or its name beside the point.
The few colours are fixed, so that the page's style sheet can swap them for the dark; the page draws the legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal
from xml.etree import ElementTree

import altair as alt
import pandas as pd
import vl_convert

from harness.metrics import Row
from harness.results import Training
from reports.tables import gib, plain, target_name
from reports.words import training_seconds

INK, MUTED, GRID = "#1f2328", "#59636e", "#d8dee4"
SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]
SHAPES = ["circle", "square", "triangle-up", "diamond"]
GLYPHS = ["●", "■", "▲", "◆"]
FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"
PANELS_PER_LINE = 5

Layered = alt.LayerChart | alt.FacetChart


def scatter(rows: Sequence[Row]) -> Layered | None:
    """Decode speed against peak memory, with lines of equal tok/s per GiB; None where no cell has both."""
    placed = [row for row in rows if row.tokens_per_second_per_gib is not None]
    if not placed:
        return None
    data = pd.DataFrame(
        [
            {
                "gib": gib(row.peak_bytes),
                "speed": row.decode_tokens_per_second,
                "label": plain(row.cell.label),
                "target": _target(row, rows),
                "baseline": row.is_baseline,
            }
            for row in placed
        ]
    )
    width, height = 980, 430
    (x0, x1), (y0, y1) = _padded(data.gib, 0.12), (0.0, float(data.speed.max()) * 1.12)
    x = alt.X(
        "gib:Q",
        title="peak memory, GiB",
        axis=alt.Axis(tickCount=8, grid=False),
        scale=alt.Scale(domain=[x0, x1], nice=False, zero=False),
    )
    y = alt.Y(
        "speed:Q", title="decode speed, tok/s", axis=alt.Axis(tickCount=7), scale=alt.Scale(domain=[y0, y1], nice=False)
    )
    lines = _equal_ratio_lines(x0, x1, y1, float((data.speed / data.gib).max()))
    rays = alt.Chart(lines).mark_line(color=MUTED, strokeDash=[2, 4], strokeWidth=1).encode(x=x, y=y, detail="ratio:N")
    ends = lines[lines.end]
    ray_names = (
        alt.Chart(ends)
        .mark_text(color=MUTED, fontSize=10, align="right", dx=-4, dy=-6)
        .encode(x=x, y=y, text=alt.Text("name:N"))
    )
    points = (
        alt.Chart(data)
        .mark_point(size=90, filled=True, opacity=1)
        .encode(x=x, y=y, color=_color(rows), shape=_shape(rows))
    )
    rings = (
        alt.Chart(data[data.baseline]).mark_point(size=260, shape="circle", color=INK, strokeWidth=1.2).encode(x=x, y=y)
    )
    across, down = (data.gib - x0) / (x1 - x0) * width, height - data.speed / y1 * height
    places = _label_places(list(zip(across, down, strict=True)), data.label.tolist(), width, height)
    names = [
        alt.Chart(data.iloc[[index]])
        .mark_text(color=INK, fontSize=12, align=align, dx=dx, dy=dy)
        .encode(x=x, y=y, text="label:N")
        for index, (align, dx, dy) in enumerate(places)
    ]
    return alt.layer(rays, ray_names, rings, points, *names, width=width, height=height)


def acceptance(rows: Sequence[Row]) -> alt.ConcatChart | None:
    """A panel a method: how often each depth was accepted where it was reached, and (dotted) how often drafted."""
    data = pd.DataFrame(
        [
            {
                "method": plain(row.cell.label),
                "target": _target(row, rows),
                "depth": depth.depth,
                "drafted": depth.drafted / depth.passes,
                "accepted": depth.probability,
            }
            for row in rows
            for depth in row.acceptance
        ]
    )
    if data.empty:
        return None
    depths = list(range(1, int(data.depth.max()) + 1))

    def panel(part: pd.DataFrame, first_column: bool) -> Layered:
        axis = alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1], labels=first_column, ticks=first_column)
        x = alt.X("depth:O", title="depth", scale=alt.Scale(domain=depths), axis=alt.Axis(labelAngle=0, grid=False))
        accepted, drafted = (
            alt.Y(f"{name}:Q", title=None, scale=alt.Scale(domain=[0, 1.05]), axis=axis)
            for name in ("accepted", "drafted")
        )
        base = alt.Chart(part)
        often = base.mark_line(strokeWidth=1.2, strokeDash=[1, 3]).encode(x=x, y=drafted, color=_color(rows))
        line = base.mark_line(strokeWidth=1.5).encode(x=x, y=accepted, color=_color(rows))
        points = base.mark_point(filled=True, size=42, opacity=1).encode(
            x=x, y=accepted, color=_color(rows), shape=_shape(rows)
        )
        return alt.layer(often, line, points, width=164, height=120)

    return _panels(data, panel)


def categories(rows: Sequence[Row]) -> alt.ConcatChart | None:
    """A panel a method: each category's speed-up and interval on a ratio scale; the upright line is plain decoding."""
    data = pd.DataFrame(
        [
            {
                "method": plain(row.cell.label),
                "target": _target(row, rows),
                "category": plain(part.category),
                "speedup": part.speedup.value,
                "low": part.speedup.low,
                "high": part.speedup.high,
            }
            for row in rows
            for part in row.speedup_by_category
        ]
    )
    if data.empty:
        return None
    ends = data[["speedup", "low", "high"]].astype(float)
    low, high = min(float(ends.min().min()), 0.9) * 0.95, max(float(ends.max().max()), 1.1) * 1.05
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    ticks = alt.Axis(
        values=[0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8],
        format="~g",
        labelExpr="datum.label + '\N{MULTIPLICATION SIGN}'",
    )
    order = list(dict.fromkeys(data.category))
    lanes = max(data.groupby("method").target.nunique())

    def panel(part: pd.DataFrame, first_column: bool) -> Layered:
        axis = alt.Axis(grid=True, ticks=False, domain=False, labels=first_column, labelLimit=130)
        y = alt.Y("category:N", title=None, scale=alt.Scale(domain=order), axis=axis)
        lane = alt.YOffset("lane:O", scale=alt.Scale(domain=list(range(lanes)), paddingOuter=0.6))
        names = list(dict.fromkeys(part.target))
        base = alt.Chart(part.assign(lane=part.target.map(names.index)))
        one = alt.Chart(pd.DataFrame({"one": [1]})).mark_rule(color=INK, strokeWidth=1)
        whole = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5)
        points = base.mark_point(filled=True, size=40, opacity=1)
        return alt.layer(
            one.encode(x=alt.X("one:Q", title=None, scale=scale, axis=ticks)),
            whole.encode(
                x=alt.X("low:Q", title=None, scale=scale, axis=ticks),
                x2="high:Q",
                y=y,
                yOffset=lane,
                color=_color(rows),
            ),
            points.encode(
                x=alt.X("speedup:Q", title=None, scale=scale, axis=ticks),
                y=y,
                yOffset=lane,
                color=_color(rows),
                shape=_shape(rows),
            ),
            width=150,
            height=len(order) * (9 * lanes + 6),
        )

    return _panels(data, panel)


def training(training: Sequence[Training]) -> Layered | None:
    """Held-out tau against training seconds; None for fewer than two drafters with a tau."""
    data = pd.DataFrame(
        [
            {"label": plain(one.method), "seconds": training_seconds(one), "tau": one.held_out_tau}
            for one in training
            if one.held_out_tau is not None
        ]
    )
    if len(data) < 2:
        return None
    x = alt.X(
        "seconds:Q",
        title="training, s (own steps, target's passes, writing the text)",
        axis=alt.Axis(tickCount=6, grid=False),
    )
    y = alt.Y(
        "tau:Q",
        title="held-out τ, tokens per pass",
        axis=alt.Axis(tickCount=5),
        scale=alt.Scale(domain=_padded(data.tau, 0.2), nice=False),
    )
    base = alt.Chart(data)
    points = base.mark_point(filled=True, size=80, color=SERIES[0], opacity=1).encode(x=x, y=y)
    names = base.mark_text(color=INK, fontSize=12, dy=-12).encode(x=x, y=y, text="label:N")
    return alt.layer(points, names, width=560, height=200)


def svg(chart: alt.TopLevelMixin, name: str, title: str, description: str) -> str:
    """The chart as one inline `<svg role="img">`, its ids made unique by `name`, no script and nothing to load."""
    spec = (
        chart.properties(background="transparent")
        .configure(
            aria=False,
            font=FONT,
            view=alt.ViewConfig(stroke=None),
            axis=alt.AxisConfig(
                labelColor=MUTED,
                titleColor=INK,
                gridColor=GRID,
                domainColor=MUTED,
                tickColor=MUTED,
                labelFontSize=11,
                titleFontSize=12,
                titleFontWeight="normal",
                titlePadding=8,
            ),
            title=alt.TitleConfig(color=INK, fontSize=12, anchor="start", frame="group", offset=6),
        )
        .to_dict()
    )
    root = ElementTree.fromstring(vl_convert.vegalite_to_svg(spec))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif value.startswith("url(#"):
                element.set(key, value.replace("url(#", f"url(#{name}-", 1))
    root.attrib.pop("version", None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, id=f"{name}-{tag}")
        element.text = text
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _panels(data: pd.DataFrame, panel: Callable[[pd.DataFrame, bool], Layered]) -> alt.ConcatChart:
    """A small chart a method, in the plan's order; `panel` is told whether it stands in the first column."""
    methods = list(dict.fromkeys(data.method))
    title = alt.TitleParams
    charts = [
        panel(data[data.method == name], index % PANELS_PER_LINE == 0).properties(title=title(name, limit=190))
        for index, name in enumerate(methods)
    ]
    return alt.concat(*charts, columns=PANELS_PER_LINE, spacing=22)


def targets(rows: Sequence[Row]) -> list[str]:
    """The targets' names in the order of their colours and shapes."""
    return list(dict.fromkeys(_target(row, rows) for row in rows))


def _target(row: Row, rows: Sequence[Row]) -> str:
    return target_name(row.cell, [other.cell for other in rows])


def _color(rows: Sequence[Row]) -> alt.Color:
    return alt.Color("target:N", scale=_series(rows, SERIES), legend=None)


def _shape(rows: Sequence[Row]) -> alt.Shape:
    return alt.Shape("target:N", scale=_series(rows, SHAPES), legend=None)


def _series(rows: Sequence[Row], marks: list[str]) -> alt.Scale:
    names = targets(rows)
    return alt.Scale(domain=names, range=[marks[index % len(marks)] for index in range(len(names))])


def _padded(values: pd.Series[float], share: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = share * ((high - low) or high)
    return low - margin, high + margin


def _equal_ratio_lines(x0: float, x1: float, y1: float, top: float) -> pd.DataFrame:
    """Rays of equal tok/s per GiB at round numbers, clipped to the plot; the end inside the plot carries the name."""
    step = 10 ** math.floor(math.log10(top / 4))
    step *= next(nice for nice in (1, 2, 5, 10) if top / (step * nice) <= 7)
    lines = []
    for index in range(1, math.floor(1.3 * top / step) + 1):
        ratio = step * index
        right = min(x1, y1 / ratio)
        if right > x0:
            name = f"{ratio:g} tok/s per GiB"
            lines.append({"ratio": ratio, "gib": max(x0, 0), "speed": ratio * max(x0, 0), "end": False, "name": name})
            lines.append({"ratio": ratio, "gib": right, "speed": ratio * right, "end": True, "name": name})
    return pd.DataFrame(lines, columns=["ratio", "gib", "speed", "end", "name"]).astype({"end": bool})


Align = Literal["left", "center", "right"]
Place = tuple[Align, float, float]
Box = tuple[float, float, float, float]

BESIDE: list[Place] = [("left", 9, 4), ("right", -9, 4), ("center", 0, -11), ("center", 0, 19)]
FURTHER: list[Place] = [(align, dx, dy + by) for by in (-12, 12, -24, 24, -36, 36) for align, dx, dy in BESIDE[:2]]


def _label_places(points: list[tuple[float, float]], labels: list[str], width: float, height: float) -> list[Place]:
    """Where each point's name goes so that names cover neither points nor each other, as far as a greedy search can."""
    near = [(x - 18, y - 8, x + 18, y + 8) for x, y in points]
    taken: list[Box] = []
    chosen = []
    for own, ((x, y), label) in enumerate(zip(points, labels, strict=True)):
        others = [*taken, *near[:own], *near[own + 1 :]]
        costs = []
        for place in (*BESIDE, *FURTHER):
            box = _text_box(x, y, place, label)
            costs.append((sum(_overlap(box, other) for other in others) + _outside(box, width, height), box, place))
        _, box, place = min(costs, key=lambda cost: cost[0])
        taken.append(box)
        chosen.append(place)
    return chosen


def _text_box(x: float, y: float, place: Place, label: str) -> Box:
    align, dx, dy = place
    wide = 6.6 * len(label)
    left = x + dx - {"left": 0.0, "center": 0.5, "right": 1.0}[align] * wide
    return left, y + dy - 11, left + wide, y + dy + 3


def _overlap(one: Box, two: Box) -> float:
    across = min(one[2], two[2]) - max(one[0], two[0])
    down = min(one[3], two[3]) - max(one[1], two[1])
    return max(across, 0) * max(down, 0)


def _outside(box: Box, width: float, height: float) -> float:
    return 1000.0 * (box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height)
