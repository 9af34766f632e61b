"""Draws JSON of bench/edge_throughput.py: speed-ups as bars beside FILE as .png, scaling as lines in FILE-scaling.png.

python bench/plot.py bench/results/edge-throughput-2-cores.json
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `bench`, where it runs as a script
from bench.comparison import read_results
from bench.results import Row
from bench.table import BASELINES


def draw(path: Path, found: dict[str, Any]) -> list[Path]:
    """Draw the results of one file into `path` and, where it has scaling, beside it; nothing without matplotlib."""
    if not importlib.util.find_spec("matplotlib"):
        return []
    draw_speedups(path, found["rows"])
    if "scaling_lines" not in found:
        return [path]
    beside = path.with_name(f"{path.stem}-scaling{path.suffix}")
    draw_scaling(beside, found["scaling_lines"])
    return [path, beside]


def draw_speedups(path: Path, rows: Sequence[Row]) -> None:
    """Speed-up of every row as bars, one panel per pass."""
    from matplotlib.figure import Figure  # the object interface needs no display and no global state

    passes = list(dict.fromkeys(row["pass"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(7 * len(passes), 1.5 + 0.45 * len(cases)), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(passes), sharey=True, squeeze=False)[0], passes, strict=True):
        ratios = {row["case"]: row["speedup"] for row in rows if row["pass"] == name}
        for index, baseline in enumerate(BASELINES):
            places = [place + 0.2 * (index - 1.5) for place in range(len(cases))]
            axis.barh(places, [ratios[case].get(baseline) or 0 for case in cases], 0.2, label=baseline)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=name, xlabel="time over ours (no bar: not measured, or accuracy red)", yticks=range(len(cases)))
        axis.set_yticklabels(cases)
    axis.invert_yaxis()
    axis.legend()
    figure.savefig(path)


def draw_scaling(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Time over what grows: a panel per series, a row of panels each for plain and BatchNorm."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(line["series"] for line in lines))
    figure = Figure(figsize=(4.5 * len(names), 8), layout="constrained")
    for folded, panels in zip((False, True), figure.subplots(2, len(names), squeeze=False), strict=True):
        for name, axis in zip(names, panels, strict=True):
            for line in lines:
                if (line["series"], line["batch_norm"]) != (name, folded):
                    continue
                style = "-" if line["pass"] == "forward" else "--"
                for color, key in (("tab:gray", "eager"), ("tab:blue", "ours")):
                    label = f"{key}, {line['pass']}"
                    axis.plot(line["values"], line["milliseconds"][key], style, marker=".", color=color, label=label)
            axis.set(title="with BatchNorm" if folded else "plain", xlabel=name, ylabel="milliseconds")
            axis.set(xlim=(0, None), ylim=(0, None))
    panels[-1].legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    for file in parser.parse_args(argv).files:
        try:
            found = read_results(file)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        drawn = draw(file.with_suffix(".png"), found)
        if not drawn:
            print("matplotlib is not installed: pip install matplotlib", file=sys.stderr)
            return 1
        print(*drawn, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
