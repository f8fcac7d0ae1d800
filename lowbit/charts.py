"""Three drawings with two axes, as SVG that lives inside a page: steps, curves, and points with error bars.

No colour is written here: every mark has a class (`s0`, `s1`, ... for series; `axis`, `grid`, `note`)
and the page's style sheet colours them, so a chart follows dark mode and prints. Text has the page's
font at a size that is still read when the chart shrinks to a phone's width. Whatever has
only one axis is a table with bars in its cells, drawn by the page itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 46
MARKERS = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: Name and unit.
        low: Smallest value shown.
        high: Largest.
        log: Logarithmic.
        percent: Ticks are fractions, shown in percent.
    """

    label: str
    low: float
    high: float
    log: bool = False
    percent: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1; values beyond an end lie on it."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(v, 1e-300)) for v in (value, low, high))
        return min(1.0, max(0.0, (value - low) / ((high - low) or 1)))

    def ticks(self) -> list[float]:
        """Round values from one end to the other.

        >>> Axis("size, GB", 0, 2.2).ticks()
        [0.0, 0.5, 1.0, 1.5, 2.0]
        >>> Axis("KL, nats", 0.002, 0.5, log=True).ticks()
        [0.01, 0.1]
        >>> Axis("KL, nats", 0.03, 0.2, log=True).ticks()
        [0.05, 0.1, 0.2]
        """
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
            if len(decades) > 1:
                step = math.ceil(len(decades) / 6)
                return [float(f"1e{power}") for power in decades[::step]]
            first = math.floor(low)
            some = [float(f"{digit}e{power}") for power in (first, first + 1) for digit in (1, 2, 5)]
            inside = [tick for tick in some if self.low <= tick <= self.high * 1.0001]
            if len(inside) > 1:
                return inside
        rough = (self.high - self.low) / 5 or 1
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.8)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]

    def text(self, value: float) -> str:
        """A tick's label."""
        if self.percent:
            return f"{100 * value:g} %"
        if self.log and value < 0.001:
            return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{value:g}"


@dataclass(frozen=True)
class Point:
    """A measured point.

    Attributes:
        x: Its place.
        y: Its place.
        error: Standard error of `y`, or None.
        label: What it is.
        series: Number of its colour and marker.
    """

    x: float
    y: float
    error: float | None
    label: str
    series: int = 0


class Chart:
    """Two axes with ticks and names, and what is drawn between them.

    Args:
        x: Horizontal axis.
        y: Vertical axis.
        title: What a screen reader says.
    """

    def __init__(self, x: Axis, y: Axis, title: str) -> None:
        self.x, self.y = x, y
        self.svg = Element("svg", {
            "class": "chart", "viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": title,
        })  # fmt: skip
        bottom = HEIGHT - BOTTOM
        for tick in y.ticks():
            at = self._y(tick)
            self._line("grid", LEFT, at, WIDTH - RIGHT, at)
            self._text(y.text(tick), LEFT - 7, at + 4, "tick", "end")
        for tick in x.ticks():
            at = self._x(tick)
            self._line("axis", at, bottom, at, bottom + 4)
            self._text(x.text(tick), at, bottom + 18, "tick", "middle")
        self._line("axis", LEFT, bottom, WIDTH - RIGHT, bottom)
        self._text(x.label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "name", "middle")
        middle = (TOP + bottom) / 2
        name = self._text(y.label, 14, middle, "name", "middle")
        name.set("transform", f"rotate(-90 14 {middle:g})")

    def __str__(self) -> str:
        return tostring(self.svg, encoding="unicode")

    def _x(self, value: float) -> float:
        return round(LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT), 1)

    def _y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - BOTTOM - TOP), 1)

    def _line(self, style: str, x1: float, y1: float, x2: float, y2: float) -> None:
        SubElement(self.svg, "line", {
            "class": style, "x1": f"{x1:g}", "y1": f"{y1:g}", "x2": f"{x2:g}", "y2": f"{y2:g}"
        })  # fmt: skip

    def _text(self, text: str, x: float, y: float, style: str, anchor: str) -> Element:
        place = {"class": style, "x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor}
        element = SubElement(self.svg, "text", place)
        element.text = text
        return element

    def steps(self, edges: Sequence[float], heights: Sequence[float]) -> None:
        """A histogram: `heights[i]` between `edges[i]` and `edges[i + 1]`."""
        bottom = HEIGHT - BOTTOM
        path = [f"M{self._x(edges[0]):g} {bottom}"]
        for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
            path.append(f"L{self._x(left):g} {self._y(height):g}H{self._x(right):g}")
        path.append(f"V{bottom}Z")
        SubElement(self.svg, "path", {"class": "area s0", "d": "".join(path)})

    def curve(self, xs: Sequence[float], ys: Sequence[float], series: int) -> None:
        """A line through points; dashed differently from series to series."""
        points = [f"{self._x(x):g} {self._y(y):g}" for x, y in zip(xs, ys, strict=True)]
        style = f"curve s{series % 8} d{series % 4}"
        SubElement(self.svg, "path", {"class": style, "d": "M" + "L".join(points)})

    def line(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """A thin line that joins points."""
        points = [f"{self._x(x):g} {self._y(y):g}" for x, y in zip(xs, ys, strict=True)]
        SubElement(self.svg, "path", {"class": "join", "d": "M" + "L".join(points)})

    def mark(self, value: float, label: str, row: int = 0) -> None:
        """A vertical line at a value, with its name beside it on that row."""
        at, left = self._x(value), self.x.place(value) > 0.6
        self._line("mark", at, TOP, at, HEIGHT - BOTTOM)
        self._text(label, at + (-5 if left else 5), TOP + 11 + 16 * row, "note", "end" if left else "start")

    def points(self, points: Sequence[Point]) -> None:
        """Points with error bars, each with its label where it hides least."""
        taken = [(self._x(p.x), self._y(p.y)) for p in points]
        for point in sorted(points, key=lambda p: p.y):
            x, y = self._x(point.x), self._y(point.y)
            if point.error:
                low, high = self._y(max(point.y - point.error, self.y.low)), self._y(point.y + point.error)
                for line in ((x, low, x, high), (x - 4, low, x + 4, low), (x - 4, high, x + 4, high)):
                    self._line(f"bar s{point.series % 8}", *line)
            marker = SubElement(self.svg, "path", {"class": f"point s{point.series % 8}"})
            marker.set("d", _marker(MARKERS[point.series % len(MARKERS)], x, y))
            SubElement(marker, "title").text = point.label
            self._label(point.label, x, y, taken)

    def _label(self, text: str, x: float, y: float, taken: list[tuple[float, float]]) -> None:
        """Right of the point or left of it, and away from other points and their labels."""
        width = 6.6 * len(text)
        places = [
            (start, y + 4 + shift, anchor)
            for shift in (0, -15, 15, -30, 30, -45, 45, -60, 60)
            for start, anchor in ((x + 10, "start"), (x - 10, "end"))
        ]

        def hidden(place: tuple[float, float, str]) -> tuple[int, float]:
            left = place[0] - (width if place[2] == "end" else 0)
            outside = (left < LEFT) + (left + width > WIDTH) + (place[1] < TOP) + (place[1] > HEIGHT - BOTTOM)
            covered = sum(left - 8 < a < left + width + 8 and abs(b + 4 - place[1]) < 13 for a, b in taken)
            return 10 * outside + covered, abs(place[1] - y)

        best = min(places, key=hidden)
        self._text(text, *best[:2], "note", best[2])
        left = best[0] - (width if best[2] == "end" else 0)
        taken += [(left + step, best[1] - 4) for step in range(0, int(width) + 1, 12)]


def _marker(shape: str, x: float, y: float, r: float = 5.5) -> str:
    if shape == "circle":
        return f"M{x - r:g} {y:g}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0Z"
    if shape == "square":
        return f"M{x - r + 0.5:g} {y - r + 0.5:g}h{2 * r - 1:g}v{2 * r - 1:g}h{1 - 2 * r:g}Z"
    if shape == "diamond":
        return f"M{x:g} {y - r - 1:g}l{r + 1:g} {r + 1:g}l{-r - 1:g} {r + 1:g}l{-r - 1:g} {-r - 1:g}Z"
    return f"M{x:g} {y - r - 0.5:g}l{r + 0.5:g} {2 * r:g}h{-2 * r - 1:g}Z"


def around(low: float, high: float, log: bool = False) -> tuple[float, float]:
    """Ends of an axis that leave some room around the data.

    >>> around(1.0, 3.0)
    (0.76, 3.24)
    """
    if log:
        low, high = math.log10(low), math.log10(high)
    room = 0.12 * (high - low) or 0.1 * (abs(high) or 1)
    ends = (low - room, high + room)
    return (10 ** ends[0], 10 ** ends[1]) if log else (round(ends[0], 12), round(ends[1], 12))
