"""Throughput of the fused mix beside eager PyTorch, stack + einsum and torch.compile, on CPU or GPU."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; its profiler prints every start and stop
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `bench`, and the two packages where they are not installed
from bench import accuracy, results
from bench.baselines import PASSES, Compiler, Mix, copy_of_the_same_size, eager, empty_compile_cache, stack_einsum
from bench.cases import DARTS_SHAPES, DTYPES, LARGE_SHAPE, LAYOUTS, Case, Inputs, make_cases, make_inputs
from bench.pruned_edge import pruned_cost
from bench.timing import Timings, peak_memory, time_interleaved
from dssp_kernels import mixed_sum
from dssp_kernels.backend import implementation_for

NOISY = 0.5  # distance between the quartiles over the median: above this, only repeating the run tells more
Contenders = Mapping[str, tuple[Mix, Sequence[Inputs]]]  # name -> the mix and its input sets


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit status 1: ours failed the accuracy check of some row, which then shows RED and no speed-up.",
    )
    add = parser.add_argument
    add("--device", type=torch.device, help="cpu or cuda (default: cuda where there is one)")
    add(
        "--quick",
        action="store_true",
        help="under a minute: the DARTS shapes at K=7 in float32 and a pruned node; a CPU compiles one layout only",
    )
    add("--shapes", type=shape, nargs="+", metavar="NxCxHxW", help="default: DARTS' three, on a GPU also a large one")
    add("--layouts", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    add("--dtypes", choices=DTYPES, nargs="+", help="default: float32 bfloat16 (--quick: float32)")
    add("--k", type=positive, nargs="+", help="candidates per edge (default: 7 8; --quick: 7)")
    add("--edges", type=positive, default=4, help="edges of the node that pruned shares are measured on (default: 4)")
    add("--pruned", type=share, nargs="*", help="pruned shares of that node (default: 0 0.5; --quick: 0.5)")
    add("--seconds", type=float, help="time per row (default: 2; --quick: 0.4)")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--out", type=Path, default=results.ROOT / "bench" / "results" / "latest", help="folder for JSON and plot")
    add("--json", type=Path, help="another file for the same JSON")
    args = parser.parse_args(argv)
    fill_defaults(args)
    if any(round(part * args.edges) == args.edges for part in args.pruned):
        parser.error(f"--pruned: at least one of the node's {args.edges} edges must stay active")
    return args


def fill_defaults(args: argparse.Namespace) -> None:
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.shapes = args.shapes or [*DARTS_SHAPES, *([LARGE_SHAPE] if args.device.type == "cuda" else [])]
    args.dtypes = args.dtypes or (["float32"] if args.quick else ["float32", "bfloat16"])
    args.k = args.k or ([7] if args.quick else [7, 8])
    args.pruned = ([0.5] if args.quick else [0.0, 0.5]) if args.pruned is None else args.pruned
    args.seconds = (0.4 if args.quick else 2.0) if args.seconds is None else args.seconds


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected four positive sizes such as 64x16x32x32, got {text!r}")
    return sizes


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


def share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to below 1, got {text}")
    return float(text)


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Inputs to take in turn: on a GPU enough of them to overflow its L2 twice; on a CPU one set, as a network that
    has just written its activations finds them."""
    sets = 1
    if device.type == "cuda":
        set_bytes = (case.edges * case.candidates + 1) * case.tensor_bytes
        sets += 2 * torch.cuda.get_device_properties(device).L2_cache_size // set_bytes
    return [make_inputs(case, device, seed) for seed in range(sets)]


def measure(case: Case, ours: Mix, compiler: Compiler, device: torch.device, seconds: float) -> list[results.Row]:
    """One row for the forward pass and one for forward + backward."""
    sets = input_sets(case, device)
    removed = 0 if case.flagged else case.pruned_inputs
    kept = [inputs.without(removed) for inputs in sets]
    exact = accuracy.float64_results(sets[0])
    errors = {
        "eager": accuracy.relative_errors(eager, sets[0], exact),
        "ours": accuracy.relative_errors(ours, kept[0], exact, pruned=removed),
    }
    del exact
    contenders: dict[str, tuple[Mix, Sequence[Inputs]]] = {"eager": (eager, sets)}
    if case.layout != "channels_last":
        contenders["eager channels_last"] = (eager, [inputs.to(layout="channels_last") for inputs in sets])
    contenders["stack+einsum"] = (stack_einsum, sets)
    compiled, compile_seconds = compiler.compile(eager, sets[0], device)
    if compiled:
        contenders["torch.compile"] = (compiled, sets)
    contenders["ours"] = (ours, kept)
    peaks = {
        name: peak_memory({key: partial(run, mix, inputs[0]) for key, (mix, inputs) in contenders.items()}, device)
        for name, run in PASSES.items()
    }
    return [
        row(case, name, errors, time_pass(case, name, contenders, device, seconds))
        | {"peak_memory_bytes": peaks[name], "compile_seconds": compile_seconds.get(name)}
        for name in PASSES
    ]


def time_pass(case: Case, name: str, contenders: Contenders, device: torch.device, seconds: float) -> Timings:
    turns: dict[str, Any] = {
        key: [partial(PASSES[name], mix, inputs) for inputs in sets] for key, (mix, sets) in contenders.items()
    }
    total_bytes = case.minimum_bytes(backward=name != "forward")
    turns["copy"] = copy_of_the_same_size(total_bytes, len(contenders["eager"][1]), device)
    return time_interleaved(turns, device, seconds=seconds)


def row(case: Case, name: str, errors: Mapping[str, accuracy.Errors], timings: Timings) -> results.Row:
    checked = accuracy.FORWARD if name == "forward" else accuracy.FORWARD_BACKWARD
    accurate = accuracy.is_accurate(errors["ours"], errors["eager"], checked, DTYPES[case.dtype])
    total_bytes = case.minimum_bytes(backward=name != "forward")
    baselines = [key for key in timings.seconds if key not in ("ours", "copy")]
    return {
        "case": str(case),
        "shape": list(case.shape),
        "layout": case.layout,
        "dtype": case.dtype,
        "candidates": case.candidates,
        "edges": case.edges,
        "pruned": case.pruned_edges / case.edges,
        "pruned_as": ("flagged" if case.flagged else "removed") if case.pruned_edges else None,
        "pass": name,
        "milliseconds": {key: 1e3 * timings.median(key) for key in timings.seconds},
        "spread": {key: timings.spread(key) for key in timings.seconds},
        "rounds": timings.rounds,
        "speedup": {key: timings.ratio(key, "ours") if accurate else None for key in baselines},
        "best_speedup": {key: timings.best_ratio(key, "ours") if accurate else None for key in baselines},
        "minimum_bytes": total_bytes,
        "gb_per_s": total_bytes / timings.median("ours") / 1e9,
        "fraction_of_copy": timings.ratio("copy", "ours"),
        "error": {key: {part: found[part] for part in checked} for key, found in errors.items()},
        "accuracy": "green" if accurate else "red",
    }


def run(args: argparse.Namespace, ours: Mix) -> dict[str, Any]:
    cases = make_cases(args.shapes, args.layouts, args.dtypes, args.k, args.edges, args.pruned, args.quick)
    compiler, left_out = Compiler(enabled=not args.no_compile), Compiler(enabled=False)
    rows = []
    for index, case in enumerate(cases, 1):
        print(f"[{index}/{len(cases)}] {case}", file=sys.stderr, flush=True)
        brief = args.quick and args.device.type == "cpu"  # a CPU compiles for half a minute even so
        compiled = not brief or (case.edges == 1 and case.layout == args.layouts[0])
        rows += measure(case, ours, compiler if compiled else left_out, args.device, args.seconds)
    pruned = pruned_cost(args.shapes[0], args.device, args.seconds)
    return {
        "machine": results.machine(args.device) | {"implementation": implementation_for(args.device)},
        "versions": results.versions(),
        "commit": results.commit(),
        "torch_compile": compiler.problem or "measured",
        "rows": rows,
        "summary": {
            "speedup": results.mean_speedups(rows, DARTS_SHAPES, "speedup"),
            "best_speedup": results.mean_speedups(rows, DARTS_SHAPES, "best_speedup"),
            "pruned_edge": {"shape": list(args.shapes[0]), "share_of_active": pruned},
            "red_rows": sum(row["accuracy"] == "red" for row in rows),
            "noisy_rows": sum(max(row["spread"].values()) > NOISY for row in rows),
        },
    }


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{results.TIMES}{ratio:.2f}"


def print_summary(found: dict[str, Any]) -> None:
    if found["torch_compile"] != "measured":
        print(f"torch.compile: not measured: {found['torch_compile']}")
    summary = found["summary"]
    print(
        "Geometric means over the DARTS shapes, K=7, float32, times ours (in brackets: fastest round against fastest):"
    )
    for layout, passes in summary["speedup"].items():
        for name, ratios in passes.items():
            best = summary["best_speedup"][layout][name]
            shown = [f"{key} {times(ratio)} ({times(best[key])})" for key, ratio in ratios.items()]
            print(f"  {layout} {name}: {', '.join(shown)}")
    shares = summary["pruned_edge"]["share_of_active"].items()
    print("Pruned FusedMixedEdge, share of an active one:", ", ".join(f"{key} {value:.2%}" for key, value in shares))
    if summary["noisy_rows"]:
        print(
            f"Noisy: in {summary['noisy_rows']} of {len(found['rows'])} rows some quartiles lie over {NOISY:.0%} apart"
        )
    if summary["red_rows"]:
        print(f"RED: {summary['red_rows']} rows failed the accuracy check (twice eager's own error against float64)")


def main(argv: Sequence[str] | None = None, ours: Mix = mixed_sum) -> int:
    args = parse(argv)
    start = time.perf_counter()
    with empty_compile_cache():
        found = run(args, ours)
    found |= {"command": argv or sys.argv[1:], "seconds": time.perf_counter() - start}
    results.print_table(found["rows"])
    print_summary(found)
    for path in filter(None, [args.out / "edge_throughput.json", args.json]):
        results.write_json(path, found)
        print(f"JSON: {path}")
    plot = args.out / "edge_throughput.png"
    print(f"Plot: {plot}" if results.write_plot(plot, found["rows"]) else "Plot: skipped, matplotlib is not installed")
    return 1 if found["summary"]["red_rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
