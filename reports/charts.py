"""The page's charts, as Vega-Lite; `reports.draw` makes SVG of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np
import pandas as pd

from harness.metrics import Row
from harness.results import Training
from reports.draw import (
    BESIDE,
    GRID,
    INK,
    MUTED,
    ON_PART,
    PAPER,
    PARTS,
    SERIES,
    SHAPES,
    Layered,
    Place,
    label_places,
    padded,
    text_box,
    text_width,
)
from reports.parts import Parts
from reports.tables import gib, pareto, plain, target_name
from reports.words import training_seconds

TIMES = "\N{MULTIPLICATION SIGN}"
AS_RATIO = f"datum.label + '{TIMES}'"
PANELS_PER_LINE, PANELS_PX, PANELS_APART = 5, 890, 22
BAR_PX = 24
WIDEST = 2.5
"an interval that is wider leaves the chart: a few rounds can give any width"
NEGLIGIBLE = 0.002
"share of a bar that nobody could see"
RAY_NAME: Place = ("right", -4, -6)
"beside the end of its line"
NO_RAYS = pd.DataFrame({"ray": [], "x": [], "y": [], "end": pd.Series([], dtype=bool), "name": []})
RATIO_TICKS = [0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16]


def scatter(rows: Sequence[Row]) -> Layered | None:
    """Decode speed against peak memory, with lines of equal tok/s per GiB and the Pareto front; None without both."""
    placed = [row for row in rows if row.tokens_per_second_per_gib is not None]
    if not placed:
        return None
    data = _placed(placed, rows, [gib(row.peak_bytes) for row in placed], [_speed(row) for row in placed])
    (x0, x1), (y0, y1) = padded(data.x.tolist(), 0.12), (0.0, float(data.y.max()) * 1.12)
    x = alt.X("x:Q", title="peak memory, GiB", axis=alt.Axis(tickCount=8, grid=False), scale=_exactly(x0, x1))
    y = alt.Y("y:Q", title="decode speed, tok/s", axis=alt.Axis(tickCount=7), scale=_exactly(y0, y1))
    on_front = pareto(rows)
    data["alike"] = [f"{row.cell.runtime} {row.cell.device} {row.cell.context}" for row in placed]
    front = data[[row.cell.id in on_front for row in placed]].sort_values("x")
    lines = _equal_ratio_lines(x0, x1, y1, float((data.y / data.x).max()))
    steps = alt.Chart(front).mark_line(color=INK, strokeWidth=1, interpolate="step-after", opacity=0.55)
    return _cloud(data, x, y, lines, [steps.encode(x=x, y=y, detail="alike:N")], rows, (980, 430), (x0, x1), (y0, y1))


def tau(rows: Sequence[Row]) -> Layered | None:
    """Speed-up against tokens per pass: below the upright 1 a method loses; rays join equal costs of a pass."""
    placed = [row for row in rows if row.speedup is not None and row.tau is not None]
    if not placed:
        return None
    data = _placed(placed, rows, [row.tau for row in placed], [row.speedup.value for row in placed if row.speedup])
    data["low"] = [row.speedup.low for row in placed if row.speedup]
    data["high"] = [row.speedup.high for row in placed if row.speedup]
    least, most = _reach(data, "y")
    (x0, x1), (y0, y1) = (0.95, float(data.x.max()) * 1.08 + 0.05), (min(0.9, least) * 0.8, max(1.3, most) * 1.12)
    x = alt.X("x:Q", title="τ, tokens per pass", axis=alt.Axis(tickCount=8, grid=False), scale=_exactly(x0, x1))
    ticks = alt.Axis(tickCount=7, labelExpr=AS_RATIO, grid=False)
    y, low = (alt.Y(f"{end}:Q", title="speed-up", axis=ticks, scale=_exactly(y0, y1)) for end in ("y", "low"))
    costs = sorted({1.0, *_nice_costs([row.break_even_tau for row in placed])})
    ends = [
        {"ray": cost, "x": at, "y": at / cost, "end": end, "name": f"a pass costs {cost:g}{TIMES}"}
        for cost in costs
        for at, end in ((max(x0, y0 * cost), False), (min(x1, y1 * cost), True))
        if y0 * cost < x1
    ]
    even = alt.Chart(pd.DataFrame([{"y": 1.0, "x": x0, "name": "break-even"}]))
    marks = [
        even.mark_rule(color=INK, strokeWidth=1.2).encode(y=y),
        even.mark_text(color=INK, align="left", dx=6, dy=12, fontSize=11).encode(x=x, y=y, text="name:N"),
        alt.Chart(data[data.low.notna()])
        .mark_rule(strokeWidth=1.4, opacity=0.6, clip=True)
        .encode(x=x, y=low, y2="high:Q", color=_color(rows)),
    ]
    return _cloud(data, x, y, pd.DataFrame(ends), marks, rows, (980, 380), (x0, x1), (y0, y1))


def _reach(data: pd.DataFrame, value: str) -> tuple[float, float]:
    """How far an axis reaches: to the ends of the intervals, but not beyond `WIDEST` times the values."""
    low, high = float(data[value].min()), float(data[value].max())
    ends = data[["low", "high"]].astype(float)
    least, most = float(ends.low.min()), float(ends.high.max())
    if math.isnan(least):
        return low, high
    return max(min(low, least), low / WIDEST), min(max(high, most), high * WIDEST)


def _exactly(low: float, high: float) -> alt.Scale:
    return alt.Scale(domain=[low, high], nice=False, zero=False)


def _placed(placed: Sequence[Row], rows: Sequence[Row], x: Sequence[object], y: Sequence[object]) -> pd.DataFrame:
    data = {
        "x": x,
        "y": y,
        "label": [plain(row.cell.label) for row in placed],
        "target": [_target(row, rows) for row in placed],
        "baseline": [row.is_baseline for row in placed],
    }
    return pd.DataFrame(data).astype({"x": float, "y": float})


def _cloud(
    data: pd.DataFrame,
    x: alt.X,
    y: alt.Y,
    rays: pd.DataFrame,
    marks: Sequence[alt.Chart],
    rows: Sequence[Row],
    size: tuple[int, int],
    x_ends: tuple[float, float],
    y_ends: tuple[float, float],
) -> Layered:
    """Points with their names beside them, over `_rays` and what `marks` draw; a ring round a baseline.

    A name that found no room beside its point has a thin line to it.
    """
    (width, height), (x0, x1), (y0, y1) = size, x_ends, y_ends
    points = alt.Chart(data).mark_point(size=90, filled=True, opacity=1)
    rings = alt.Chart(data[data.baseline]).mark_point(size=260, shape="circle", color=INK, strokeWidth=1.2)

    def pixels(at: pd.DataFrame) -> list[tuple[float, float]]:
        across, down = (at.x - x0) / (x1 - x0) * width, height - (at.y - y0) / (y1 - y0) * height
        return list(zip(across, down, strict=True))

    named = rays[rays.end]
    taken = [text_box(*at, RAY_NAME, name) for at, name in zip(pixels(named), named.name, strict=True)]
    places = label_places(pixels(data), data.label.tolist(), width, height, taken)
    aligned, right, below = zip(*places, strict=True)
    moved = data.assign(
        align=aligned,
        x=data.x + np.array(right) * (x1 - x0) / width,
        y=data.y - np.array(below) * (y1 - y0) / height,
    )
    tied = data.assign(to_x=moved.x, to_y=moved.y + 4 * (y1 - y0) / height)[[place not in BESIDE for place in places]]
    ties = alt.Chart(tied).mark_rule(color=MUTED, strokeWidth=0.8).encode(x=x, y=y, x2="to_x:Q", y2="to_y:Q")
    names = [
        alt.Chart(moved[moved["align"] == align])
        .mark_text(fontSize=12, align=align, **ink)
        .encode(x=x, y=y, text="label:N")
        for align in dict.fromkeys(aligned)
        for ink in ({"color": PAPER, "stroke": PAPER, "strokeWidth": 3}, {"color": INK})
    ]
    shown = points.encode(x=x, y=y, color=_color(rows), shape=_shape(rows))
    behind = [*_rays(rays, x, y), *marks, *([ties] if len(tied) else ())]
    return alt.layer(*behind, rings.encode(x=x, y=y), shown, *names, width=width, height=height)


def _rays(lines: pd.DataFrame, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """Dotted lines, each from its row without `end` to its row with it, where its name stands; none for no rows."""
    if lines.empty:
        return []
    drawn = alt.Chart(lines).mark_line(color=MUTED, strokeDash=[2, 4], strokeWidth=1)
    align, dx, dy = RAY_NAME
    names = alt.Chart(lines[lines.end]).mark_text(color=MUTED, fontSize=10, align=align, dx=dx, dy=dy)
    return [drawn.encode(x=x, y=y, detail="ray:N"), names.encode(x=x, y=y, text="name:N")]


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
            lines.append({"ray": ratio, "x": max(x0, 0), "y": ratio * max(x0, 0), "end": False, "name": name})
            lines.append({"ray": ratio, "x": right, "y": ratio * right, "end": True, "name": name})
    return pd.DataFrame(lines) if lines else NO_RAYS


def _nice_costs(costs: Sequence[float | None]) -> list[float]:
    top = max((cost for cost in costs if cost is not None), default=1.0)
    return [cost for cost in (1.5, 2, 3, 4, 6, 8, 12, 16) if cost < 1.3 * top]


# --- small multiples --------------------------------------------------------------------------------------------------


def acceptance(rows: Sequence[Row]) -> Layered | None:
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
    axis = alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1])
    shown = depths if len(depths) <= 10 else [depth for depth in depths if depth == 1 or depth % 5 == 0]
    along = alt.Axis(labelAngle=0, grid=False, values=shown)
    x = alt.X("depth:O", title="depth", scale=alt.Scale(domain=depths), axis=along)
    accepted, drafted = (
        alt.Y(f"{name}:Q", title=None, scale=alt.Scale(domain=[0, 1.05]), axis=axis) for name in ("accepted", "drafted")
    )
    base, color = alt.Chart(data), _color(rows)
    often = base.mark_line(strokeWidth=1.2, strokeDash=[1, 3]).encode(x=x, y=drafted, color=color)
    line = base.mark_line(strokeWidth=1.5).encode(x=x, y=accepted, color=color)
    points = base.mark_point(filled=True, size=42, opacity=1)
    layers = alt.layer(often, line, points.encode(x=x, y=accepted, color=color, shape=_shape(rows)))
    return _panels(layers, data, 160, 120)


def categories(rows: Sequence[Row]) -> Layered | None:
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
    data = data.round(9)  # the last bits of a sum depend on where in memory it lay, and a page must not
    order = list(dict.fromkeys(data.category))
    names = targets(rows)
    lanes = max(data.groupby("method").target.nunique())
    data["lane"] = data.target.map(names.index) % lanes
    lines = alt.Axis(grid=True, ticks=False, domain=False, labelLimit=130)
    y = alt.Y("category:N", title=None, scale=alt.Scale(domain=order), axis=lines)
    lane = alt.YOffset("lane:O", scale=alt.Scale(domain=list(range(lanes)), paddingOuter=0.6))
    middle, low = (_ratio_axis(name, data[["speedup", "low", "high"]]) for name in ("speedup", "low"))
    base, color = alt.Chart(data), _color(rows)
    whole = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5, clip=True)
    points = base.mark_point(filled=True, size=40, opacity=1)
    layers = alt.layer(
        base.transform_aggregate(n="count()", groupby=["method"]).mark_rule(color=INK).encode(x=alt.XDatum(1)),
        whole.encode(x=low, x2="high:Q", y=y, yOffset=lane, color=color),
        points.encode(x=middle, y=y, yOffset=lane, color=color, shape=_shape(rows)),
    )
    return _panels(layers, data, 150, len(order) * (9 * lanes + 6))


def _ratio_axis(name: str, values: pd.DataFrame) -> alt.X:
    """Speed-ups on a logarithmic scale around 1."""
    least, most = _reach(values, "speedup")
    low, high = min(least, 0.9) * 0.95, max(most, 1.1) * 1.05
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    labels = {"format": "~g", "labelExpr": AS_RATIO, "labelOverlap": "greedy", "labelSeparation": 6}
    axis = alt.Axis.from_dict({"values": RATIO_TICKS, "gridColor": GRID, **labels})
    return alt.X(f"{name}:Q", title=None, scale=scale, axis=axis)


def _panels(layers: Layered, data: pd.DataFrame, width: int, height: int) -> Layered:
    """A small chart a method, in the plan's order, as wide as its name at least."""
    order = list(dict.fromkeys(data.method))
    wide = max(width, *(math.ceil(text_width(method)) for method in order))
    columns = min(PANELS_PER_LINE, (PANELS_PX + PANELS_APART) // (wide + PANELS_APART)) or 1
    by_method = alt.Facet("method:N", sort=order, title=None)
    sized = layers.properties(width=wide, height=height)
    panels: Layered = sized.facet(facet=by_method, columns=columns, spacing=PANELS_APART).resolve_axis(x="independent")
    return panels


# --- bars -------------------------------------------------------------------------------------------------------------


def stack(bars: Mapping[str, Parts], title: str) -> Layered | None:
    """A bar each, made of named parts; every part has one colour, and its name where there is room for it."""
    if not bars:
        return None
    width, longest = 760, max(sum(parts.values()) for parts in bars.values()) or 1.0
    kinds = part_names(bars)
    pieces = []
    for bar, parts in bars.items():
        at = 0.0
        for kind in (kind for kind in kinds if parts.get(kind)):
            end = at + parts[kind]
            room = (end - at) / longest * width
            on = ON_PART[kinds.index(kind) % 2]
            name = kind if text_width(kind) + 8 < room else ""
            pieces.append({"bar": bar, "part": kind, "from": at, "to": end, "name": name, "on": on})
            at = end
    data = pd.DataFrame(pieces, columns=["bar", "part", "from", "to", "name", "on"])
    data["middle"] = (data["from"] + data["to"]) / 2
    scale = alt.Scale(domain=[0, longest], nice=False)
    x = alt.X("from:Q", title=title, scale=scale, axis=alt.Axis(tickCount=8))
    # As wide as a wide font would make the names: the page's own may not be installed.
    names_px = min(260, max(text_width(bar) for bar in bars))
    axis = alt.Axis(labelLimit=260, minExtent=names_px, ticks=False, domain=False)
    y = alt.Y("bar:N", title=None, sort=list(bars), axis=axis)
    colors = alt.Scale(domain=kinds, range=[PARTS[index % len(PARTS)] for index in range(len(kinds))])
    base = alt.Chart(data)
    whole = base.mark_bar(stroke=PAPER, strokeWidth=1, height=BAR_PX - 8).encode(
        x=x, x2="to:Q", y=y, color=alt.Color("part:N", scale=colors, legend=None)
    )
    names = [
        alt.Chart(data[(data.on == color) & (data.name != "")])
        .mark_text(color=color, fontSize=11)
        .encode(x=alt.X("middle:Q", scale=scale), y=y, text="name:N")
        for color in ON_PART
    ]
    return alt.layer(whole, *names, width=width, height=BAR_PX * len(bars))


def part_names(bars: Mapping[str, Parts]) -> list[str]:
    """All parts that can be seen in some bar, in their own order."""
    names = dict.fromkeys(name for parts in bars.values() for name in parts)
    wholes = [(parts, sum(parts.values())) for parts in bars.values()]
    return [name for name in names if any(parts.get(name, 0.0) > NEGLIGIBLE * whole for parts, whole in wholes)]


def training(training: Sequence[Training], rows: Sequence[Row]) -> Layered | None:
    """What a drafter's training bought: speed-up of every cell that used it, against its seconds of training."""
    paid = {one.method: training_seconds(one) for one in training}
    placed = [row for row in rows if row.cell.method in paid and row.speedup is not None]
    if len({row.cell.method for row in placed}) < 2:
        return None
    gains = [row.speedup.value for row in placed if row.speedup]
    data = _placed(placed, rows, [paid[row.cell.method] for row in placed], gains)
    left, x1 = padded(data.x.tolist(), 0.2)
    x0, (y0, y1) = max(left, 0.0), (min(0.9, float(data.y.min()) * 0.9), max(1.1, float(data.y.max()) * 1.1))
    title = "training, s (own steps, target's passes, writing the text)"
    x = alt.X("x:Q", title=title, axis=alt.Axis(tickCount=6, grid=False), scale=_exactly(x0, x1))
    ticks = alt.Axis(tickCount=5, labelExpr=AS_RATIO)
    y = alt.Y("y:Q", title="speed-up in this run", axis=ticks, scale=_exactly(y0, y1))
    even = alt.Chart(pd.DataFrame([{"y": 1.0}])).mark_rule(color=INK, strokeWidth=1.2).encode(y=y)
    return _cloud(data, x, y, NO_RAYS, [even], rows, (760, 260), (x0, x1), (y0, y1))


# --- what tells targets apart -----------------------------------------------------------------------------------------


def targets(rows: Sequence[Row]) -> list[str]:
    """The targets' names in the order of their colours and shapes."""
    return list(dict.fromkeys(_target(row, rows) for row in rows))


def _target(row: Row, rows: Sequence[Row]) -> str:
    return target_name(row.cell, [other.cell for other in rows])


def _speed(row: Row) -> float | None:
    return row.decode_tokens_per_second


def _color(rows: Sequence[Row]) -> alt.Color:
    return alt.Color("target:N", scale=_series(rows, SERIES), legend=None)


def _shape(rows: Sequence[Row]) -> alt.Shape:
    return alt.Shape("target:N", scale=_series(rows, SHAPES), legend=None)


def _series(rows: Sequence[Row], marks: list[str]) -> alt.Scale:
    names = targets(rows)
    return alt.Scale(domain=names, range=[marks[index % len(marks)] for index in range(len(names))])
