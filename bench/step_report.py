"""Results of bench/search_step.py on the terminal and as a plot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from bench.results import TIMES, Row
from bench.step_kinds import KINDS
from bench.step_scaling import print_scaling
from bench.table import in_bytes

CONTENDERS = ("stock", "stock_channels_last", "stock_fused", "ours", "ours_half_pruned")  # the fused not everywhere


def print_results(found: dict[str, Any]) -> None:
    for row in found["cases"]:
        print_case(row)
    if found["scaling"]:
        print("Training step of ours as it grows:")
        print_scaling(found["scaling"])
    for name, first in found["first_step"].items():
        shown = first.get("problem") or (
            f"{first['seconds']:.2f} s after the process started (imports {first['import_seconds']:.2f}, supernet and "
            f"batch {first['build_seconds']:.2f}, the step {first['step_seconds']:.2f})"
        )
        print(f"First step of ours, {name}: {shown}")
    if not found["torch_compile"]:
        print("torch.compile of stock: left out (--compile-timeout 0)")
    for name, compiled in found["torch_compile"].items():
        shown = compiled.get("problem") or (
            f"step {compiled['seconds']:.3f} s (eager {compiled['stock_seconds']:.3f}) after "
            f"{compiled['compile_seconds']:.0f} s of compiling"
        )
        print(f"torch.compile of stock, {name}: {shown}")


def print_case(row: Row) -> None:
    """A block per case: times, memory, speed-ups of ours where its results agree, errors and kinds."""
    print(f"{row['name']}: seconds per training step, float32; ours against it in brackets")
    for name in contenders(row):
        line = f"  {name:20}{row[f'{name}_seconds']:9.4f}{times(row['speedup'].get(name)):10}"
        line += f"forward {row['forward_seconds'][name]:.4f}  backward {row['backward_seconds'][name]:.4f}  "
        if "bilevel_seconds" in row:
            line += f"bilevel step {row['bilevel_seconds'][name]:.4f}{times(row['bilevel_speedup'].get(name)):10}"
        peak = f"  peak {in_bytes(row[f'{name}_peak_bytes'])}" if f"{name}_peak_bytes" in row else ""
        print(f"{line}quartiles {row['spread'][name]:.0%} apart{peak}")
    shares = f"peak memory {row['peak_share']:.2f} of stock's; half pruned takes {row['half_pruned_share']:.2f} of all"
    print(f"  {shares if row['accuracy'] == 'green' else 'RED: loss or gradients are not those of stock'}")
    print(
        f"  off stock by: loss {row['loss_error']:.0e}, worst gradient {row['gradient_error']:.0e} "
        f"(stock channels_last: {row['gradient_error_stock_channels_last']:.0e}), "
        f"worst gradient in float64 {row['gradient_error_float64']:.0e}"
    )
    if "stock_fused_seconds" in row:
        print(
            f"  stock after fuse_mixed_ops, against stock_channels_last{times(row['stock_fused_speedup'])}: "
            f"off stock by: loss {row['stock_fused_loss_error']:.0e}, worst gradient "
            f"{row['stock_fused_gradient_error']:.0e}, in float64 {row['stock_fused_gradient_error_float64']:.0e}"
        )
    for name, shares in row.get("kinds", {}).items():
        print(f"  {name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))


def contenders(row: Row) -> list[str]:
    return [name for name in CONTENDERS if f"{name}_seconds" in row]


def times(ratio: float | None) -> str:
    return "" if ratio is None else f" ({TIMES}{ratio:.2f})"


def draw(path: Path, found: dict[str, Any]) -> bool:
    """Steps, kinds of operation and scaling, as far as measured, as panels; False without matplotlib."""
    if not importlib.util.find_spec("matplotlib"):
        return False
    from matplotlib.figure import Figure  # the object interface needs no display and no global state

    cases, lines = found["cases"], found["scaling"]
    figure = Figure(figsize=(14, 4.5 * (len(cases) + bool(lines))), layout="constrained")
    grid = figure.add_gridspec(len(cases) + bool(lines), 12)
    for position, row in enumerate(cases):
        draw_steps(figure.add_subplot(grid[position, :6]), row)
        if "kinds" in row:
            draw_kinds(figure.add_subplot(grid[position, 6:]), row)
    for position, line in enumerate(lines):
        axis = figure.add_subplot(grid[-1, 12 * position // len(lines) : 12 * (position + 1) // len(lines)])
        axis.plot(line["values"], line["seconds"], "o")
        fitted = [(line["fixed_ms"] + line["ms_each"] * value) / 1e3 for value in line["values"]]
        axis.plot(line["values"], fitted, "--", color="gray")
        axis.set(title=f"ours, {line['case']}", xlabel=line["series"], ylabel="seconds", xlim=(0, None), ylim=(0, None))
    figure.savefig(path)
    return True


def draw_steps(axis: Any, row: Row) -> None:
    """Forward and backward of every contender, stacked."""
    forward, backward = (row[f"{phase}_seconds"] for phase in ("forward", "backward"))
    names = contenders(row)
    left = [forward[name] for name in names]
    axis.barh(names, left, label="forward")
    axis.barh(names, [backward[name] for name in names], left=left, label="backward")
    axis.set(title=f"{row['name']}: training step", xlabel="seconds")
    axis.invert_yaxis()
    axis.legend()


def draw_kinds(axis: Any, row: Row) -> None:
    """Seconds of the step by kind of operation, beside each other."""
    width = 0.8 / len(row["kinds"])
    for index, (name, shares) in enumerate(row["kinds"].items()):
        places = [place + index * width for place in range(len(KINDS))]
        axis.barh(places, [row[f"{name}_seconds"] * shares[kind] for kind in KINDS], width, label=name)
    axis.set(title=f"{row['name']}: by kind of operation", xlabel="seconds", yticks=range(len(KINDS)))
    axis.set_yticklabels(KINDS)
    axis.invert_yaxis()
    axis.legend()
