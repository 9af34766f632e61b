"""Draws a derived cell as SVG: states in layers from left to right, every edge labelled with its operation.

Layered drawing after Sugiyama et al. (1981). Between two layers of states lies a column of slots, one for every edge
that passes there, and an edge's label fills its slot in the column before its target: labels cannot overlap, nor be
crossed by an edge.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from markupsafe import Markup

from dssp.report.axis import spread
from dssp.report.svg import drawing, element, markup, state_name, state_text

Cell = Sequence[Sequence[tuple[str, int]]]  # per node, its incoming edges (operation, source state): a Genotype's half

FAMILIES = {
    "sep_conv": "separable convolution",
    "dil_conv": "dilated convolution",
    "conv": "convolution",
    "pool": "pooling",
    "skip": "skip connection",
    "other": "other",
}
_NODE, _INPUT, _RAMP, _LABEL_HEIGHT, _PAD = 30.0, 58.0, 46.0, 20.0, 8.0


def family(operation: str) -> str:
    """The key of FAMILIES an operation belongs to, judged by its name."""
    return next((key for key in FAMILIES if key in operation), "other")


@dataclass(eq=False)
class Slot:
    """A place in a column: a state, or the passage of an edge (with its label if `text` is set)."""

    column: int
    width: float
    height: float
    state: str = ""  # its name; "" for a passage
    text: str = ""
    before: list[Slot] = field(default_factory=list)
    after: list[Slot] = field(default_factory=list)
    x: float = 0.0  # centre
    y: float = 0.0
    gap: float = 0.0  # width of the column

    def neighbours(self, before: bool) -> list[Slot]:
        return self.before if before else self.after


@dataclass(frozen=True)
class Route:
    """An edge's way: the slots from its source to its target. The operation of a concatenation edge is None."""

    operation: str | None
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Layout:
    columns: list[list[Slot]]
    routes: list[Route]
    width: float
    height: float


def draw_cell(cell: Cell, concat: Sequence[int], title: str, inputs: int = 2) -> Markup:
    """One cell of a genotype as an SVG picture; `title` names it for screen readers."""
    return markup(cell_drawing(cell, concat, title, inputs))


def cell_drawing(cell: Cell, concat: Sequence[int], title: str, inputs: int) -> ET.Element:
    """The same as an element tree: a group of class "edge" per edge, in the order of the cell."""
    layout = lay_out(cell, concat, inputs)
    svg = drawing(layout.width, layout.height, title)
    svg.set("class", "cell")
    for route in sorted(layout.routes, key=lambda route: route.operation is not None):
        _draw_route(svg, route)
    for slot in (slot for column in layout.columns for slot in column if slot.state != ""):
        _draw_state(svg, slot)
    return svg


def label_of(operation: str) -> str:
    """An operation's name as a label has room for it."""
    return operation if len(operation) <= 24 else operation[:23] + "\N{HORIZONTAL ELLIPSIS}"


def lay_out(cell: Cell, concat: Sequence[int], inputs: int = 2) -> Layout:
    """Places the states and routes the edges of a cell with so many inputs."""
    columns, routes = _columns(cell, concat, inputs)
    _order(columns)
    _place(columns)
    x = _PAD
    for column in columns:
        width = max((slot.width for slot in column), default=0.0)  # nothing passes where no edge is left
        for slot in column:
            slot.x, slot.gap = x + width / 2, width
        x += width + _RAMP
    height = max(slot.y + slot.height / 2 for column in columns for slot in column) + _PAD
    return Layout(columns, routes, x - _RAMP + _PAD, height)


def _columns(cell: Cell, concat: Sequence[int], inputs: int) -> tuple[list[list[Slot]], list[Route]]:
    """Even columns hold the states of one layer, odd ones the passages between two layers."""
    layer = dict.fromkeys(range(inputs), 0)
    for node, incoming in enumerate(cell, inputs):
        layer[node] = 1 + max((layer[source] for _, source in incoming), default=0)
    last = 1 + max(layer.values())
    columns: list[list[Slot]] = [[] for _ in range(2 * last + 1)]
    slots: dict[int | str, Slot] = {}
    placed: list[tuple[int | str, int]] = [*layer.items(), ("c_{k}", last)]
    for state, of_state in placed:
        is_node = isinstance(state, int) and state >= inputs
        slots[state] = Slot(2 * of_state, _NODE if is_node else _INPUT, _NODE + 12, state_name(state, inputs))
        columns[2 * of_state].append(slots[state])
    edges = [(op, slots[source], slots[node]) for node, incoming in enumerate(cell, inputs) for op, source in incoming]
    routes = [_route(columns, operation, source, target) for operation, source, target in edges]
    return columns, routes + [_route(columns, None, slots[state], slots["c_{k}"]) for state in concat]


def _route(columns: list[list[Slot]], operation: str | None, source: Slot, target: Slot) -> Route:
    way = [source]
    for column in range(source.column + 1, target.column):
        slot = Slot(column, 0, 12)
        if operation is not None and column == target.column - 1:
            slot.text = label_of(operation)
            slot.width, slot.height = 6.8 * len(slot.text) + 12, _LABEL_HEIGHT + 6
        columns[column].append(slot)
        way.append(slot)
    way.append(target)
    for left, right in pairwise(way):
        left.after.append(right)
        right.before.append(left)
    return Route(operation, tuple(way))


def _crossings(columns: list[list[Slot]]) -> int:
    total = 0
    for left, right in pairwise(columns):
        rank = {id(slot): i for i, slot in enumerate(right)}
        ends = [(i, rank[id(after)]) for i, slot in enumerate(left) for after in slot.after]
        total += sum((a - c) * (b - d) < 0 for n, (a, b) in enumerate(ends) for c, d in ends[:n])
    return total


def _order(columns: list[list[Slot]]) -> None:
    """Sorts each column by the mean rank of its neighbours, to and fro, keeping the order with the fewest crossings."""
    best, best_crossings = [list(column) for column in columns], _crossings(columns)
    for sweep in range(24):
        forward = sweep % 2 == 0
        for column in columns if forward else reversed(columns):
            rank = {slot: i for other in columns for i, slot in enumerate(other)}
            keys = {slot: fmean([rank[n] for n in slot.neighbours(forward)] or [rank[slot]]) for slot in column}
            column.sort(key=keys.__getitem__)
        if (crossings := _crossings(columns)) < best_crossings:
            best, best_crossings = [list(column) for column in columns], crossings
    columns[:] = best


def _place(columns: list[list[Slot]]) -> None:
    """Heights: every slot moves towards the mean of its neighbours as far as its column leaves room."""
    for column in columns:
        for slot, y in zip(column, spread([0.0] * len(column), [slot.height for slot in column]), strict=True):
            slot.y = y
    for sweep in range(200):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wanted = [_wanted(slot, column) for slot in column]
            for slot, y in zip(column, spread(wanted, [slot.height for slot in column]), strict=True):
                slot.y = y
    top = min(slot.y - slot.height / 2 for column in columns for slot in column) - _PAD
    for slot in (slot for column in columns for slot in column):
        slot.y -= top


def _wanted(slot: Slot, column: Sequence[Slot]) -> float:
    """The mean height of its neighbours; passages pull each other harder, so that long edges run straight.

    What has no neighbours, an input that no edge leaves, stays with its column.
    """
    pull = {n: 8 if n.state == slot.state == "" else 1 for n in slot.before + slot.after}
    return (
        sum(weight * n.y for n, weight in pull.items()) / sum(pull.values())
        if pull
        else fmean(other.y for other in column)
    )


def _draw_route(svg: ET.Element, route: Route) -> None:
    source, *passages, target = route.slots
    kind = "concat" if route.operation is None else f"edge f-{family(route.operation)}"
    group = element(svg, "g", class_=kind)
    what = "concatenated" if route.operation is None else route.operation
    element(group, "title", f"{source.state} \N{RIGHTWARDS ARROW} {target.state}: {what}")
    tip_x, tip_y = target.x - target.width / 2, target.y + _port(route.slots)
    x, y = source.x + source.width / 2, source.y
    path = [f"M{x:.1f} {y:.1f}"]
    stops = [(slot.x - slot.gap / 2, slot.x + slot.gap / 2, slot.y) for slot in passages] + [
        (tip_x - 6, tip_x - 6, tip_y)
    ]
    for begin, end, level in stops:
        middle = (x + begin) / 2
        path.append(f"C{middle:.1f} {y:.1f} {middle:.1f} {level:.1f} {begin:.1f} {level:.1f}H{end:.1f}")
        x, y = end, level
    element(group, "path", class_="wire", d="".join(path))
    element(group, "path", class_="tip", d=f"M{tip_x:.1f} {tip_y:.1f}l-8 -3.5v7z")
    for slot in passages:
        if slot.text:
            left, top = slot.x - slot.width / 2, slot.y - _LABEL_HEIGHT / 2
            element(group, "rect", class_="label", x=left, y=top, width=slot.width, height=_LABEL_HEIGHT, rx=4)
            element(group, "text", slot.text, x=slot.x, y=slot.y + 4, text_anchor="middle")


def _port(slots: Sequence[Slot]) -> float:
    """Where on its target's left side an edge arrives, relative to the middle: arrowheads lie side by side."""
    *_, last, target = slots
    arriving = sorted(target.before, key=lambda slot: slot.y)
    apart = min(9.0, (_NODE - 8) / len(arriving))
    return (arriving.index(last) - (len(arriving) - 1) / 2) * apart


def _draw_state(svg: ET.Element, slot: Slot) -> None:
    group = element(svg, "g", class_="state end" if slot.state.startswith("c_") else "state")
    left, top = slot.x - slot.width / 2, slot.y - _NODE / 2
    element(group, "rect", x=left, y=top, width=slot.width, height=_NODE, rx=_NODE / 2)
    state_text(group, slot.state, x=slot.x, y=slot.y + 4.5, text_anchor="middle")
