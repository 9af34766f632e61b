"""The candidates' softmax weights as a heat map: a row per edge, a column per operation, small lines for the past."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dssp.report.charts import sparkline
from dssp.report.run_folder import Edge, Run
from dssp.report.units import DASH

Weights = Sequence[float | None]  # of one edge, per candidate


@dataclass(frozen=True)
class Weight:
    """One candidate of one edge: its last weight, that as a share of the page's largest, and the way there."""

    text: str
    share: float
    best: bool
    history: Markup


@dataclass(frozen=True)
class Row:
    edge: Edge
    removed: bool
    weights: list[Weight]


@dataclass(frozen=True)
class HeatMap:
    cell: str
    operations: list[str]
    rows: list[Row]


def heat_maps(run: Run, removed: Collection[Edge]) -> list[HeatMap]:
    """Per cell type the candidates' softmax weights: of every edge those of the last epoch that has them."""
    histories = {edge: [epoch.weights.get(edge) or () for epoch in run.epochs] for edge in run.edges}
    last = {edge: weights for edge in run.edges if (weights := next(filter(None, reversed(histories[edge])), None))}
    numbers = [w for history in histories.values() for weights in history for w in weights if w is not None]
    highest = max(numbers, default=0) or 1.0
    maps = []
    for cell in dict.fromkeys(edge.cell for edge in last):
        shown = [edge for edge in last if edge.cell == cell]
        width = max(len(last[edge]) for edge in shown)
        names = [*run.operations, *(f"candidate {k}" for k in range(len(run.operations), width))][:width]
        rows = [Row(e, e in removed, _weights(names, last[e], histories[e], highest)) for e in shown]
        maps.append(HeatMap(cell, names, rows))
    return maps


def _weights(names: Sequence[str], last: Weights, history: Sequence[Weights], highest: float) -> list[Weight]:
    best = max((weight for weight in last if weight is not None), default=None)
    weights = []
    for k, (name, weight) in enumerate(zip(names, last, strict=False)):
        way = sparkline([e[k] if k < len(e) else None for e in history], highest, f"{name}: weight over the epochs")
        share = min(1.0, max(0.0, (weight or 0.0) / highest))
        text = DASH if weight is None else f"{weight:.2f}"
        weights.append(Weight(text, share, weight is not None and weight == best, way))
    return weights
