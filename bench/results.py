"""What comes out: machine, versions and commit; geometric means; table, JSON and plot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dssp

Row = dict[str, Any]
TIMES = "\N{MULTIPLICATION SIGN}"
ROOT = Path(__file__).resolve().parents[1]


def machine(device: torch.device) -> dict[str, Any]:
    described: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        described |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "l2_bytes": gpu.L2_cache_size}
    return described


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dssp": dssp.__version__,
    }
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = None
    return found


def commit() -> str | None:
    """Commit of the checkout, with "+changes" where the tree differs from it; None outside a checkout."""
    try:
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def git(*arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def mean_speedups(rows: Sequence[Row], shapes: Sequence[tuple[int, ...]], key: str) -> dict[str, Any]:
    """Geometric mean over `shapes` of row[key] of single edges at K=7, float32: layout -> pass -> baseline -> ratio.

    None where a shape was not measured, has no such baseline, or failed its accuracy check.
    """
    wanted = [list(shape) for shape in shapes]
    chosen = [
        row
        for row in rows
        if row["shape"] in wanted and (row["edges"], row["candidates"], row["dtype"]) == (1, 7, "float32")
    ]
    means: dict[str, Any] = {}
    for row in chosen:
        alike = [other for other in chosen if (other["layout"], other["pass"]) == (row["layout"], row["pass"])]
        ratios = {name: [other[key].get(name) for other in alike] for name in row[key]}
        means.setdefault(row["layout"], {})[row["pass"]] = {
            name: geometric_mean(values) if len(values) == len(wanted) and None not in values else None
            for name, values in ratios.items()
        }
    return means


COLUMNS = (
    "case",
    "pass",
    "eager",
    "channels_last",
    "einsum",
    "compile",
    "ours",
    "GB/s",
    "of copy",
    "peak MB",
    "error",
    "",
)
BASELINES = ("eager", "eager channels_last", "stack+einsum", "torch.compile")


def cells(row: Row) -> list[str]:
    """One line of the table; peak memory and error as ours / eager."""

    def baseline(name: str) -> str:
        if name not in row["milliseconds"]:
            return "-"
        ratio = row["speedup"][name]
        return f"{row['milliseconds'][name]:.3f}" + (f" {TIMES}{ratio:.2f}" if ratio is not None else "")

    peak, error = row["peak_memory_bytes"], row["error"]
    return [
        row["case"],
        row["pass"].replace("forward", "fwd").replace("backward", "bwd"),
        *(baseline(name) for name in BASELINES),
        f"{row['milliseconds']['ours']:.3f}",
        f"{row['gb_per_s']:.1f}",
        f"{row['fraction_of_copy']:.0%}",
        f"{peak['ours'] / 2**20:.1f} / {peak['eager'] / 2**20:.1f}",
        f"{max(error['ours'].values()):.0e} / {max(error['eager'].values()):.0e}",
        "ok" if row["accuracy"] == "green" else "RED",
    ]


def print_table(rows: Sequence[Row]) -> None:
    """Table on the terminal, with rich where it is installed."""
    lines = [cells(row) for row in rows]
    if importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(*COLUMNS, title=f"milliseconds per call, {TIMES}: times ours; peak MB and error: ours / eager")
        for line in lines:
            table.add_row(*line, style="red" if line[-1] == "RED" else None)
        Console(width=None if sys.stdout.isatty() else 200).print(table)
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
    for line in [list(COLUMNS), *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def finite(value: Any) -> Any:
    """The same structure with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(json.dumps(finite(results), indent=1) + "\n")
    os.replace(staged, path)


def write_plot(path: Path, rows: Sequence[Row]) -> bool:
    """Speed-up of every row as bars, one panel per pass; False where matplotlib is not installed."""
    if not importlib.util.find_spec("matplotlib"):
        return False
    from matplotlib.figure import Figure  # the object interface needs no display and no global state

    passes = list(dict.fromkeys(row["pass"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(7 * len(passes), 1.5 + 0.55 * len(cases)), layout="constrained")
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
    return True
