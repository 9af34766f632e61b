"""Line charts as SVG: ticks at round values, every line named at its end, a cross where it was ended."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dssp.report.axis import spread, tick_labels, ticks
from dssp.report.svg import drawing, element, markup, state_text

Points = Sequence[tuple[float, float | None]]  # (x, y); None is a gap


@dataclass(frozen=True)
class Line:
    """One line: its name, CSS class, points, and, if it ended early, why; a thin one is not named in the picture."""

    name: str
    colour: str
    points: Points
    ended: str | None = None
    thin: bool = False

    @property
    def drawn(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None]


@dataclass(frozen=True)
class Frame:
    """Size of the picture and what all the charts of a group share: the range of x, the ticks of y, marked places."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_ticks: Sequence[float]
    warm_up: float | None = None  # the x at which warm-up ended
    level: tuple[str, float] | None = None  # a horizontal line with its name
    left: float = 36
    right: float = 44
    x_name: str | None = None  # with its unit, where x is not the epoch

    def x(self, value: float) -> float:
        low, high = self.x_range
        share = (value - low) / (high - low) if high > low else 0.5
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (value - low) / (high - low) * (self.bottom - 12)

    def at(self, x: float) -> str:
        """A place on the x axis in words."""
        return f"in epoch {x:g}" if self.x_name is None else f"at {x:.4g} {self.x_name}"

    @property
    def bottom(self) -> float:
        return self.height - 22


def line_chart(lines: Sequence[Line], frame: Frame, title: str) -> Markup:
    """The chart as an SVG picture; `title` says what it shows, units included, to a screen reader."""
    svg = drawing(frame.width, frame.height, title)
    svg.set("class", "chart")
    draw_axes(svg, frame)
    for line in lines:
        _draw_line(svg, line, frame)
    _name_lines(svg, [line for line in lines if line.drawn and not line.thin], frame)
    return markup(svg)


def draw_axes(svg: ET.Element, frame: Frame) -> None:
    """Grid, ticks with their labels, and what the frame marks."""
    left, right = frame.left, frame.width - frame.right
    if frame.warm_up is not None:
        end = frame.x(frame.warm_up)
        element(svg, "rect", class_="warm-up", x=left, y=12, width=end - left, height=frame.bottom - 12)
        if end - left > 44:
            element(svg, "text", "warm-up", class_="note", x=left + 5, y=frame.bottom - 6)
    for value, label in zip(frame.y_ticks, tick_labels(frame.y_ticks), strict=True):
        y = frame.y(value)
        element(svg, "line", class_="grid" if value != frame.y_ticks[0] else "axis", x1=left, x2=right, y1=y, y2=y)
        element(svg, "text", label, class_="tick", x=left - 6, y=y + 3.5, text_anchor="end")
    x_name, (low, high) = frame.x_name or "epoch", frame.x_range
    element(svg, "text", x_name, class_="note", x=frame.width, y=frame.bottom + 16, text_anchor="end")
    count, whole = max(2, int((right - left) / 55)), frame.x_name is None
    x_ticks = [x for x in ticks(low, high, count, whole=whole) if low <= x <= high]
    for x, label in zip(map(frame.x, x_ticks), tick_labels(x_ticks), strict=True):
        element(svg, "line", class_="axis", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 4)
        element(svg, "text", label, class_="tick", x=x, y=frame.bottom + 16, text_anchor="middle")
    if frame.level is not None:
        name, value = frame.level
        y = frame.y(value)
        element(svg, "line", class_="level", x1=left, x2=right, y1=y, y2=y)
        element(svg, "text", name, class_="note", x=left + 5, y=y - 4)


def _draw_line(svg: ET.Element, line: Line, frame: Frame) -> None:
    if not line.drawn:
        return
    first, last = line.drawn[0], line.drawn[-1]
    title = f"{line.name}: {first[1]:.4g} {frame.at(first[0])}, {last[1]:.4g} {frame.at(last[0])}"
    group = element(svg, "g", class_=f"line {line.colour}" + " thin" * line.thin)
    element(group, "title", f"{title}; {line.ended}" if line.ended else title)
    places = [(frame.x(x), None if y is None else frame.y(y)) for x, y in line.points]
    element(group, "path", class_="wire", d=path(places))
    x, y = frame.x(last[0]), frame.y(last[1])
    if line.ended:
        element(group, "path", class_="removed", d=f"M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0 -7l-7 7")
    elif not line.thin:
        element(group, "circle", cx=x, cy=y, r=2.2)


def path(places: Points) -> str:
    """The d of a line through places in pixels, interrupted at gaps."""
    parts, pen = [], "M"
    for x, y in places:
        if y is not None:
            parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "M" if y is None else "L"
    return "".join(parts)


def _name_lines(svg: ET.Element, lines: Sequence[Line], frame: Frame) -> None:
    """Names at the line ends: in the right margin, moved apart, for lines that reach it, else beside the end."""
    edge = frame.width - frame.right
    reaching = [line for line in lines if frame.x(line.drawn[-1][0]) > edge - 32]
    reaching.sort(key=lambda line: frame.y(line.drawn[-1][1]))
    heights = spread([frame.y(line.drawn[-1][1]) for line in reaching], [12.0] * len(reaching))
    overhang = max(0.0, heights[-1] - frame.bottom + 3) + min(0.0, heights[0] - 8) if heights else 0.0
    taken: list[tuple[float, float]] = []
    for line, y in zip(reaching, heights, strict=True):
        _name(svg, line, edge + 8, y - overhang + 4)
    for line in sorted((line for line in lines if line not in reaching), key=lambda line: line.drawn[-1]):
        x, y = frame.x(line.drawn[-1][0]) + 7, frame.y(line.drawn[-1][1]) + 4
        while any(abs(x - other_x) < 30 and abs(y - other_y) < 11 for other_x, other_y in taken):
            y -= 11
        taken.append((x, y))
        _name(svg, line, x, y)


def _name(svg: ET.Element, line: Line, x: float, y: float) -> None:
    state_text(svg, line.name, class_=f"name {line.colour}", x=x, y=y)


def sparkline(values: Sequence[float | None], high: float, title: str) -> Markup:
    """A line as small as a word, from 0 at the bottom to `high` at the top, without axes."""
    width, height = 46, 12
    svg = drawing(width, height, title)
    svg.set("class", "spark")
    kept = values[:: -(-len(values) // width)]  # no more points than pixels
    across, up = (width - 2) / max(1, len(kept) - 1), (height - 2) / high
    element(
        svg, "path", d=path([(1 + i * across, None if v is None else height - 1 - v * up) for i, v in enumerate(kept)])
    )
    return markup(svg)
