"""How a chart is drawn: the few fixed colours, names beside points, and SVG that needs no script.

Colours are fixed so that the page's style sheet can swap them for the dark, and never stand alone: a target also has
its own mark shape, a part of a bar its name or its place, and parts beside each other differ in lightness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from xml.etree import ElementTree

import altair as alt
import vl_convert

INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d8dee4", "#ffffff"
SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]
SHAPES = ["circle", "square", "triangle-up", "diamond"]
GLYPHS = ["●", "■", "▲", "◆"]
PARTS = ["#2a6fbb", "#f2b84b", "#b5522b", "#8fd0c0", "#7a5195", "#c9ced4", "#69737e"]
"dark and light take turns"
ON_PART = ["#fefefe", "#16181c"]
"of a name inside a part: on a dark one, on a light one"
FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"
LETTER_PX = 6.6

Layered = alt.LayerChart | alt.FacetChart

_CONFIG: dict[str, Any] = {
    "aria": False,
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": MUTED,
        "titleColor": INK,
        "gridColor": GRID,
        "domainColor": MUTED,
        "tickColor": MUTED,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    "header": {"labelColor": INK, "labelFontSize": 12, "labelAnchor": "start", "labelLimit": 190, "title": None},
}


def spec(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The chart in Vega-Lite, in the style of all."""
    return chart.to_dict(validate=False) | {"background": "transparent", "config": _CONFIG}


def svg(chart: alt.TopLevelMixin, name: str, title: str, description: str) -> str:
    """The chart as one inline `<svg role="img">`, its ids made unique by `name`, no script and nothing to load.

    The library counts ids over all that a process draws; here they count from one, so a chart is always the same text.
    """
    root = ElementTree.fromstring(vl_convert.vegalite_to_svg(spec(chart)))
    for parent in list(root.iter()):
        for element in list(parent):
            if element.get("class") in ("background", "foreground") and not _seen(element):
                parent.remove(element)
    ids: dict[str, str] = {}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            if key == "id" or value.startswith("url(#"):
                own = value.removeprefix("url(#").removesuffix(")")
                new = ids.setdefault(own, f"{name}-{len(ids) + 1}")
                element.set(key, new if key == "id" else f"url(#{new})")
            elif key in ("class", "aria-roledescription", "role", "aria-hidden", "font-family", "pointer-events"):
                del element.attrib[key]
    root.attrib.pop("version", None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, id=f"{name}-{tag}")
        element.text = text
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def png(chart: alt.TopLevelMixin) -> bytes:
    """The chart on white, at twice the size of the page's."""
    return vl_convert.vegalite_to_png(spec(chart) | {"background": PAPER}, scale=2)


def _seen(element: ElementTree.Element) -> bool:
    return any(element.get(key) not in (None, "none", "transparent") for key in ("fill", "stroke"))


def alone(picture: str, paper: str = PAPER) -> str:
    """An inline SVG as a file of its own."""
    style = f'xmlns="http://www.w3.org/2000/svg" style="background:{paper}" font-family="{FONT}" '
    return picture.replace("<svg ", f"<svg {style}", 1)


# --- names beside points ----------------------------------------------------------------------------------------------

Align = Literal["left", "center", "right"]
Place = tuple[Align, float, float]
Box = tuple[float, float, float, float]

BESIDE: list[Place] = [("left", 9, 4), ("right", -9, 4), ("center", 0, -11), ("center", 0, 19)]
FURTHER: list[Place] = [(align, dx, dy + by) for by in (-12, 12, -24, 24, -36, 36) for align, dx, dy in BESIDE[:2]]


def label_places(
    points: list[tuple[float, float]], labels: list[str], width: float, height: float, taken: Sequence[Box] = ()
) -> list[Place]:
    """Where each point's name goes so that names cover neither points nor each other nor what is `taken`, as far as a
    greedy search can."""
    near = [(x - 18, y - 8, x + 18, y + 8) for x, y in points]
    taken = [*taken]
    chosen = []
    for own, ((x, y), label) in enumerate(zip(points, labels, strict=True)):
        others = [*taken, *near[:own], *near[own + 1 :]]
        costs = []
        for place in (*BESIDE, *FURTHER):
            box = text_box(x, y, place, label)
            costs.append((sum(_overlap(box, other) for other in others) + _outside(box, width, height), box, place))
        _, box, place = min(costs, key=lambda cost: cost[0])
        taken.append(box)
        chosen.append(place)
    return chosen


def text_width(label: str) -> float:
    """Pixels, roughly, at 12 px."""
    return LETTER_PX * len(label)


def text_box(x: float, y: float, place: Place, label: str) -> Box:
    align, dx, dy = place
    wide = text_width(label)
    left = x + dx - {"left": 0.0, "center": 0.5, "right": 1.0}[align] * wide
    return left, y + dy - 11, left + wide, y + dy + 3


def _overlap(one: Box, two: Box) -> float:
    across = min(one[2], two[2]) - max(one[0], two[0])
    down = min(one[3], two[3]) - max(one[1], two[1])
    return max(across, 0) * max(down, 0)


def _outside(box: Box, width: float, height: float) -> float:
    return 1000.0 * (box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height)


def padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = share * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin
