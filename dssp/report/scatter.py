"""Points of two numbers as SVG, smaller x and larger y being better, with the front that no other point beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dssp.report.charts import Frame, draw_axes, path
from dssp.report.svg import drawing, element, markup


@dataclass(frozen=True)
class Point:
    """One point, its CSS class, and its name, which a reader sees who points at it."""

    name: str
    colour: str
    x: float
    y: float


def scatter_chart(points: Sequence[Point], frame: Frame, title: str) -> Markup:
    """The chart as an SVG picture; `title` says what it shows, units included, to a screen reader."""
    svg = drawing(frame.width, frame.height, title)
    svg.set("class", "chart")
    draw_axes(svg, frame)
    element(svg, "path", class_="front", d=path(_steps(pareto_front(points), frame)))
    for point in points:
        group = element(svg, "g", class_=f"point {point.colour}")
        element(group, "title", f"{point.name}: {point.y:.4g} {frame.at(point.x)}")
        element(group, "circle", cx=frame.x(point.x), cy=frame.y(point.y), r=4)
    return markup(svg)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points than which no other one has both a smaller (or the same) x and a larger (or the same) y, by x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def _steps(front: Sequence[Point], frame: Frame) -> list[tuple[float, float]]:
    """The border of what the front beats: up at every point, then level to the next one and to the right end."""
    places = [(frame.x(front[0].x), frame.bottom)] if front else []
    for point, after in zip(front, [*front[1:], None], strict=True):
        end = frame.width - frame.right if after is None else frame.x(after.x)
        places += [(frame.x(point.x), frame.y(point.y)), (end, frame.y(point.y))]
    return places
