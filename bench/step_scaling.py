"""How the step of our supernet grows with cells, batch, channels and edges that are left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.scaling import straight_line
from bench.step_subjects import Case, Subject, TrainingStep, load_batches, prune_to
from bench.step_turns import take_turns

SERIES = ("edges", "cells", "batch", "channels")
Point = tuple[int, Case, float]  # what grows, the case, the share of the edges that is left


def points(name: str, case: Case, quick: bool) -> list[Point]:
    """The points of a series around `case`.

    Cells come in threes: the two reductions then leave equally many cells at each of the three resolutions.
    """
    if name == "edges":
        return [(0, case, share) for share in (0.25, 0.5, 0.75, 1.0)]  # the count is that of the pruned supernet
    if name == "cells":
        return [(n, replace(case, cells=n), 1.0) for n in ((3, 6, 9) if quick else (3, 6, 9, 12, 18))]
    factors = (0.5, 1, 2) if quick else (0.5, 1, 2, 4)
    values = sorted({max(1, int(getattr(case, name) * factor)) for factor in factors})
    return [(value, Case(**{**asdict(case), name: value}), 1.0) for value in values]


def measure_series(
    name: str, case: Case, subject: Subject, device: torch.device, rounds: int, quick: bool
) -> dict[str, Any]:
    """Seconds of a training step at each point, taken in turns; the straight line through them; the growth.

    growth: d log(seconds) / d log(value) between the first and the last point; 1 is proportional, less is cheaper.
    """
    data, steps, values = subject.load(device), {}, []
    for value, grown, share in points(name, case, quick):
        supernet = subject.ours(grown, data).to(device).to(memory_format=torch.channels_last)
        prune_to(supernet, share)
        values.append(len(supernet.live_edges()) if name == "edges" else value)
        steps[str(values[-1])] = TrainingStep(supernet, load_batches(grown, data)[0]).phases
    timings = take_turns(steps, device, rounds)["step"]
    seconds = [timings.median(point) for point in steps]
    growth = math.log(seconds[-1] / seconds[0]) / math.log(values[-1] / values[0])
    line = straight_line(values, [1e3 * taken for taken in seconds])
    return {"series": name, "case": str(case), "values": values, "seconds": seconds, "growth": growth} | line


def print_scaling(lines: Sequence[dict[str, Any]]) -> None:
    """A line per series: seconds, and milliseconds per unit, at each value; then line and growth."""
    for line in lines:
        shown = [
            f"{value}: {taken:.3f} s ({1e3 * taken / value:.3g} ms each)"
            for value, taken in zip(line["values"], line["seconds"], strict=True)
        ]
        print(f"  {line['series']} (else {line['case']}): {', '.join(shown)}")
        print(
            f"    {line['fixed_ms']:.3g} ms + {line['ms_each']:.3g} ms each, at most "
            f"{line['largest_deviation']:.0%} off that line; grows as the power {line['growth']:.2f}"
        )
