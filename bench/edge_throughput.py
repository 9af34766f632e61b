"""Throughput and memory of the fused mix beside eager PyTorch, stack + einsum and torch.compile, on CPU or GPU."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; its profiler prints every start and stop
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `bench`, and the two packages where they are not installed
from bench import baselines, results
from bench.baselines import Compiler, Mix, empty_compile_cache
from bench.cases import DTYPES, LAYOUTS, Case
from bench.comparison import print_comparison, read_results
from bench.grids import DARTS_SHAPES, LARGE_SHAPE, SMALL_SHAPES, main_layout, planned_cases
from bench.measurement import measure
from bench.plot import draw
from bench.pruned_edge import pruned_cost
from bench.scaling import fit_lines, measure_scaling, print_scaling
from bench.table import print_table
from dssp_kernels.backend import implementation_for

NOISY = 0.5  # distance between the quartiles over the median: above this, only repeating the run tells more


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit status 1: ours failed the accuracy check of some row, which then shows RED and no speed-up. "
        "2: some row is over 10 % slower than in the --baseline.",
    )
    add = parser.add_argument
    add("--device", type=torch.device, help="cpu or cuda (default: cuda where there is one)")
    add(
        "--quick",
        action="store_true",
        help="under a minute: the DARTS shapes at K=7 in float32, with BatchNorm in channels_last, two small shapes, a "
        "pruned node; eager as baseline and torch.compile, on a CPU for forward + backward in channels_last without "
        "BatchNorm only",
    )
    add("--shapes", type=shape, nargs="+", metavar="NxCxHxW", help="default: DARTS' three, on a GPU also a large one")
    add("--small-shapes", type=shape, nargs="*", metavar="NxCxHxW", help="default: four (--quick: two) from 1x1x1x1 up")
    add("--layouts", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    add("--dtypes", choices=DTYPES, nargs="+", help="default: float32 bfloat16 (--quick: float32)")
    add("--k", type=positive, nargs="+", default=[7], help="candidates per edge (default: 7)")
    add("--edges", type=positive, default=5, help="edges of a node (default: 5)")
    add("--pruned", type=share, nargs="*", default=[0.4], help="pruned shares of a node (default: 0.4)")
    add(
        "--scaling",
        type=shape,
        nargs="?",
        const=DARTS_SHAPES[1],
        metavar="NxCxHxW",
        help="also time over K, edges, images and pruned edges (default shape: 64x32x16x16)",
    )
    add("--seconds", type=float, help="time per row (default: 2; --quick: 0.15)")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--out", type=Path, default=results.ROOT / "bench" / "results" / "latest", help="folder for JSON and plot")
    add("--json", type=Path, help="another file for the same JSON")
    add("--baseline", type=Path, metavar="FILE", help="JSON of an earlier run to compare with, in units of the copy")
    args = parser.parse_args(argv)
    fill_defaults(args)
    try:
        args.earlier = args.baseline and read_results(args.baseline)
    except (OSError, ValueError) as error:
        parser.error(f"--baseline: {error}")
    if any(round(part * args.edges) == args.edges for part in args.pruned):
        parser.error(f"--pruned: at least one of the node's {args.edges} edges must stay active")
    return args


def fill_defaults(args: argparse.Namespace) -> None:
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.shapes = args.shapes or [*DARTS_SHAPES, *([LARGE_SHAPE] if args.device.type == "cuda" else [])]
    args.dtypes = args.dtypes or (["float32"] if args.quick else ["float32", "bfloat16"])
    if args.small_shapes is None:
        args.small_shapes = list(SMALL_SHAPES[:2] if args.quick else SMALL_SHAPES)
    args.seconds = (0.15 if args.quick else 2.0) if args.seconds is None else args.seconds


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


def run(args: argparse.Namespace, ours: Mix) -> dict[str, Any]:
    plan, compiler = planned_cases(args), Compiler(enabled=not args.no_compile)
    rows = []
    for index, (case, passes) in enumerate(plan, 1):
        print(f"[{index}/{len(plan)}] {case}", file=sys.stderr, flush=True)
        rows += measure(
            *(case, ours, args.device, args.seconds),
            compiler=compiler,
            compiled_passes=passes,
            every_baseline=not args.quick,
        )
    scaling = measure_scaling(scaled_case(args), ours, args.device, args.seconds / 4) if args.scaling else []
    pruned = pruned_cost(args.shapes[0], args.device, args.seconds)
    found = {
        "machine": results.machine(args.device) | {"implementation": implementation_for(args.device)},
        "versions": results.versions(),
        "commit": results.commit(),
        "torch_compile": compiler.problem or "measured",
        "rows": rows,
        "summary": {
            **results.summarise(rows, DARTS_SHAPES),
            "pruned_edge": {"shape": list(args.shapes[0]), "share_of_active": pruned},
            "red_rows": sum(row["accuracy"] == "red" for row in [*rows, *scaling]),
            "noisy_rows": sum(max(row["spread"].values()) > NOISY for row in rows),
        },
    }
    if scaling:
        found |= {"scaling": str(scaled_case(args)), "scaling_rows": scaling, "scaling_lines": fit_lines(scaling)}
    return found


def scaled_case(args: argparse.Namespace) -> Case:
    return Case(args.scaling, main_layout(args), args.dtypes[0], args.k[0])


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{results.TIMES}{ratio:.2f}"


def print_summary(found: dict[str, Any]) -> None:
    if found["torch_compile"] != "measured":
        print(f"torch.compile: not measured: {found['torch_compile']}")
    summary = found["summary"]
    print(
        "Geometric means over the DARTS shapes, K=7, float32, times ours (in brackets: fastest round against fastest):"
    )
    for mixed, layouts in summary["speedup"].items():
        for layout, passes in layouts.items():
            for name, ratios in passes.items():
                best = summary["best_speedup"][mixed][layout][name]
                shown = [f"{key} {times(ratio)} ({times(best[key])})" for key, ratio in ratios.items()]
                memory = summary["memory"][mixed][layout][name]
                shown += [f"{key} {value:.2f} of eager's bytes" for key, value in memory.items() if value is not None]
                print(f"  {mixed}, {layout} {name}: {', '.join(shown)}")
    if least := summary["least_speedup"]:
        print(f"Where eager comes closest: {times(least['eager'])} ({least['case']} {least['pass']})")
    shares = summary["pruned_edge"]["share_of_active"].items()
    print("Pruned FusedMixedEdge, share of an active one:", ", ".join(f"{key} {value:.2%}" for key, value in shares))
    if summary["noisy_rows"]:
        print(
            f"Noisy: in {summary['noisy_rows']} of {len(found['rows'])} rows some quartiles lie over {NOISY:.0%} apart"
        )
    if summary["red_rows"]:
        print(f"RED: {summary['red_rows']} rows failed the accuracy check (twice eager's own error against float64)")


def main(argv: Sequence[str] | None = None, ours: Mix = baselines.ours) -> int:
    args = parse(argv)
    start = time.perf_counter()
    with empty_compile_cache():
        found = run(args, ours)
    found |= {"command": list(sys.argv[1:] if argv is None else argv), "seconds": time.perf_counter() - start}
    print_table(found["rows"])
    print_summary(found)
    if args.scaling:
        print_scaling(found["scaling_lines"], found["scaling"])
    for path in filter(None, [args.out / "edge_throughput.json", args.json]):
        results.write_json(path, found)
        print(f"JSON: {path}")
    plots = draw(args.out / "edge_throughput.png", found)
    print("Plot:", ", ".join(map(str, plots)) or "skipped, matplotlib is not installed")
    slower = print_comparison(found, args.earlier, args.baseline) if args.earlier else 0
    return 1 if found["summary"]["red_rows"] else 2 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
