"""How time grows with candidates, edges, images and edges left of a pruned node, and how close to a straight line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.baselines import PASSES, Compiler, Mix
from bench.cases import Case
from bench.measurement import measure
from bench.results import TIMES, Row

PRUNABLE = 10  # edges of the node that is pruned down to one


def series(case: Case) -> dict[str, list[tuple[int, Case]]]:
    """What grows -> its values and the case for each; everything else stays as in `case`, a single edge."""
    node = replace(case, edges=PRUNABLE)
    return {
        "candidates": [(k, replace(case, candidates=k)) for k in (1, 2, 4, 8, 16, 32)],
        "edges": [(e, replace(case, edges=e)) for e in range(1, 7)],
        "images": [(b, replace(case, shape=(b, *case.shape[1:]))) for b in (1, 4, 16, 64, 256)],
        f"edges left of {PRUNABLE}": [
            (left, replace(node, pruned_edges=PRUNABLE - left)) for left in (1, 2, 4, 6, 8, 10)
        ],
    }


def measure_scaling(case: Case, ours: Mix, device: torch.device, seconds: float) -> list[Row]:
    """Rows of every series, plain and with BatchNorm."""
    rows: list[Row] = []
    for folded in (False, True):
        for name, cases in series(replace(case, folded=folded)).items():
            print(f"[scaling] {name}{' with BatchNorm' if folded else ''}", file=sys.stderr, flush=True)
            rows += measure_series(name, cases, ours, device, seconds)
    return rows


def measure_series(
    name: str, cases: Sequence[tuple[int, Case]], ours: Mix, device: torch.device, seconds: float
) -> list[Row]:
    """Rows as everywhere, against eager only, with the "series" and its "value" in each."""
    return [
        row | {"series": name, "value": value}
        for value, case in cases
        if case.is_possible
        for row in measure(case, ours, device, seconds, compiler=Compiler(enabled=False))
    ]


def fit_lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per series and pass: values, times, speed-ups, and the straight line through the times of ours."""
    lines = []
    for folded in (False, True):
        for series_name in dict.fromkeys(row["series"] for row in rows):
            for name in PASSES:
                wanted = (series_name, folded, name)
                chosen = [row for row in rows if (row["series"], row["batch_norm"], row["pass"]) == wanted]
                values = [row["value"] for row in chosen]
                taken = {key: [row["milliseconds"][key] for row in chosen] for key in ("eager", "ours", "copy")}
                described = {"series": series_name, "batch_norm": folded, "pass": name, "values": values}
                described |= {"milliseconds": taken, "speedup": [row["speedup"]["eager"] for row in chosen]}
                lines.append(described | straight_line(values, taken["ours"]))
    return lines


def straight_line(values: Sequence[float], milliseconds: Sequence[float]) -> dict[str, float]:
    """fixed + slope * value with the least sum of squared relative deviations, and the largest deviation."""
    x, t = (torch.tensor(numbers, dtype=torch.float64) for numbers in (values, milliseconds))
    relative = torch.stack([1 / t, x / t], dim=1)
    line = torch.linalg.lstsq(relative, torch.ones(len(t), 1, dtype=torch.float64)).solution
    deviations = (relative @ line - 1).abs()
    return {"fixed_ms": float(line[0]), "ms_each": float(line[1]), "largest_deviation": float(deviations.max())}


def print_scaling(lines: Sequence[dict[str, Any]], described: str) -> None:
    """A line per series: milliseconds of ours (times eager) at each value, then the straight line."""
    print(f"Scaling at {described}: milliseconds of ours (times eager) | straight line through them")
    for line in lines:
        ratios = ["red" if ratio is None else f"{TIMES}{ratio:.2f}" for ratio in line["speedup"]]
        points = zip(line["values"], line["milliseconds"]["ours"], ratios, strict=True)
        shown = "  ".join(f"{value}: {time:.3g} ({ratio})" for value, time, ratio in points)
        print(f"  {line['series']}, {'BatchNorm, ' if line['batch_norm'] else ''}{line['pass']}: {shown}")
        print(
            f"    {line['fixed_ms']:.3g} ms + {line['ms_each']:.3g} ms each, "
            f"at most {line['largest_deviation']:.0%} off the line"
        )
