"""What comes out: machine, versions and commit; geometric means over the rows; the JSON file."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dssp

Row = dict[str, Any]
Values = Mapping[str, float | None]
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


def kind(row: Row) -> str:
    """What was mixed: "edge" or "node E=5", with BatchNorm or without."""
    mixed = "edge" if row["edges"] == 1 else f"node E={row['edges']}"
    return mixed + (" with BatchNorm" if row["batch_norm"] else "")


def means(rows: Sequence[Row], shapes: Sequence[tuple[int, ...]], values: Callable[[Row], Values]) -> dict[str, Any]:
    """Geometric means over `shapes` of values(row) at K=7, float32, nothing pruned: kind -> layout -> pass -> name.

    None where a shape was not measured, has no such value, or failed its accuracy check.
    """
    wanted = [list(shape) for shape in shapes]
    chosen: dict[tuple[str, str, str], list[Values]] = {}
    for row in rows:
        if row["shape"] in wanted and (row["candidates"], row["dtype"], row["pruned"]) == (7, "float32", 0):
            chosen.setdefault((kind(row), row["layout"], row["pass"]), []).append(values(row))
    found: dict[str, Any] = {}
    for (mixed, layout, name), alike in chosen.items():
        passes = found.setdefault(mixed, {}).setdefault(layout, {})
        passes[name] = {key: mean_of_all([each.get(key) for each in alike], len(wanted)) for key in alike[0]}
    return found


def mean_of_all(values: Sequence[float | None], count: int) -> float | None:
    present = [value for value in values if value is not None]
    return geometric_mean(present) if len(present) == len(values) == count else None


def memory_shares(row: Row) -> Values:
    """Bytes kept for backward and peak bytes, ours over eager's."""
    saved, peak = row["saved_bytes"], row["peak_memory_bytes"]
    return {"peak": peak["ours"] / peak["eager"]} | ({"saved": saved["ours"] / saved["eager"]} if saved else {})


def summarise(rows: Sequence[Row], shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What the rows come to: means over `shapes`, and the row in which eager comes closest."""
    green = [row for row in rows if row["accuracy"] == "green"]
    closest = min(green, key=lambda row: row["speedup"]["eager"], default=None)
    return {
        "speedup": means(rows, shapes, lambda row: row["speedup"]),
        "best_speedup": means(rows, shapes, lambda row: row["best_speedup"]),
        "memory": means(rows, shapes, memory_shares),
        "fraction_of_copy": means(rows, shapes, lambda row: {"copy": row["fraction_of_copy"]}),
        "least_speedup": closest
        and {"case": closest["case"], "pass": closest["pass"], "eager": closest["speedup"]["eager"]},
    }


def finite(value: Any) -> Any:
    """The same structure with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write `results`, each of its values on a line of its own and, where that is a list, each entry of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    entries = [f"{json.dumps(key)}: {on_lines(value)}" for key, value in finite(results).items()]
    staged.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    os.replace(staged, path)


def on_lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n]"
    return json.dumps(value)
