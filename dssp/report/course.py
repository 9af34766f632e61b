"""The searched cells over the epochs: every edge with its strongest candidate, drawn so that a slider can replay it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dssp.report.cells import cell_drawing, family, label_of
from dssp.report.run_folder import Edge, Epoch, Run
from dssp.report.svg import markup, state_name


@dataclass(frozen=True)
class Moment:
    """An edge in an epoch: its strongest candidate (None if unknown), gate, candidates left, and live, leaving, gone.

    `leaving`: removed at the end of the epoch.
    """

    strongest: int | None
    gate: float | None
    candidates: int
    state: str

    def to_list(self) -> list[object]:
        """What course.js reads."""
        gate = None if self.gate is None else round(self.gate, 3)
        return [self.strongest, gate, self.candidates, self.state]


@dataclass(frozen=True)
class Course:
    """The pictures of the cells, and what the page says of the last epoch; `epochs`: their numbers, as JSON."""

    cells: list[tuple[str, Markup]]
    epochs: str
    last: str


def course(run: Run, ends: Mapping[Edge, int]) -> Course | None:
    """The searched cells of a run in which these edges left after these epochs; None without edges to draw."""
    cells, last = [], []
    for cell in dict.fromkeys(edge.cell for edge in run.edges):
        edges = [edge for edge in run.edges if edge.cell == cell]
        if not run.epochs or not _is_cell(edges, run.inputs):
            continue
        moments = {edge: _moments(edge, run.epochs, ends.get(edge)) for edge in edges}
        cells.append((cell, _picture(run, cell, moments)))
        last += [of_edge[-1] for of_edge in moments.values()]
    if not cells:
        return None
    live = [moment for moment in last if moment.state != "gone"]
    text = f"{len(live)} of {len(last)} edges, {sum(moment.candidates for moment in live)} candidates"
    numbers = [epoch.epoch for epoch in run.epochs]
    return Course(cells, json.dumps(numbers), f"Epoch {numbers[-1]}: {text}")


def _is_cell(edges: Sequence[Edge], inputs: int) -> bool:
    """Whether the edges lead forward, into nodes that are counted without a gap."""
    nodes = {edge.target for edge in edges}
    return nodes == set(range(inputs, inputs + len(nodes))) and all(edge.source < edge.target for edge in edges)


def _moments(edge: Edge, epochs: Sequence[Epoch], end: int | None) -> list[Moment]:
    moments, strongest, candidates = [], None, 0
    for epoch in epochs:
        gone = end is not None and epoch.epoch > end
        weights = {k: w for k, w in enumerate(epoch.weights.get(edge) or ()) if w is not None}
        if weights and not gone:  # what an edge was when it left stays on its label
            strongest, candidates = max(weights, key=weights.__getitem__), sum(w > 0 for w in weights.values())
        state = "gone" if gone else "leaving" if epoch.epoch == end else "live"
        moments.append(Moment(strongest, epoch.gates.get(edge), candidates, state))
    return moments


def _picture(run: Run, cell: str, moments: Mapping[Edge, Sequence[Moment]]) -> Markup:
    """The cell as of the last epoch, with what the other epochs need in data attributes; labels fit all of them."""
    highest = max((m.strongest for of_edge in moments.values() for m in of_edge if m.strongest is not None), default=-1)
    names = [*run.operations, *(f"candidate {k}" for k in range(len(run.operations), highest + 1))]
    nodes: dict[int, list[Edge]] = {}
    for edge in moments:
        nodes.setdefault(edge.target, []).append(edge)
    ordered = [edge for _, of_node in sorted(nodes.items()) for edge in of_node]
    longest = {edge: max((_name(m, names) for m in moments[edge]), key=len) for edge in ordered}
    drawn = [[(longest[edge], edge.source) for edge in of_node] for _, of_node in sorted(nodes.items())]
    concat = [max(nodes)] if run.inputs == 1 else sorted(nodes)
    svg = cell_drawing(drawn, concat, f"Searched {cell} cell", run.inputs)
    svg.set("class", "cell course")
    svg.set("data-operations", json.dumps([[label_of(name), family(name)] for name in names]))
    groups = [group for group in svg.iter("g") if "edge" in group.get("class", "").split()]
    for edge, group in zip(ordered, groups, strict=True):
        _set(group, edge, moments[edge], names, run.inputs)
    return markup(svg)


def _name(moment: Moment, names: Sequence[str]) -> str:
    return "" if moment.strongest is None else names[moment.strongest]


def _set(group: ET.Element, edge: Edge, moments: Sequence[Moment], names: Sequence[str], inputs: int) -> None:
    """Make the drawn edge that of the last epoch, as course.js makes it that of any other."""
    last, name = moments[-1], _name(moments[-1], names)
    ends = f"{state_name(edge.source, inputs)} \N{RIGHTWARDS ARROW} {state_name(edge.target, inputs)}"
    group.set("class", f"edge f-{family(name)} {last.state}")
    group.set("style", f"--gate: {1 if last.gate is None else round(last.gate, 3)}")
    group.set("data-ends", ends)
    group.set("data-course", json.dumps([moment.to_list() for moment in moments], separators=(",", ":")))
    title, label = group.find("title"), group.find("text")
    if title is not None:
        title.text = f"{ends}: {'removed' if last.state == 'gone' else name}"
    if label is not None:
        label.text = label_of(name)
