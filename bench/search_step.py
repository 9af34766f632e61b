"""The step of a search: supernets as their authors write them beside ours, same weights, same batch, one process.

The JSON has at least {"machine", "cases": [{"name", "stock_seconds", "stock_channels_last_seconds", "ours_seconds",
"ours_half_pruned_seconds", "loss_error", "gradient_error", "stock_peak_bytes", "ours_peak_bytes"}...]}: seconds per
training step, errors of ours relative to stock, and the most bytes a step holds beyond weights and batch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; its profiler prints every start and stop
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and warns of memory that was there before it started
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `bench`, and the two packages where they are not installed
from bench import results
from bench.baselines import empty_compile_cache
from bench.memory import peak_memory
from bench.results import Row
from bench.step_agreement import agreement, is_green
from bench.step_kinds import share_by_kind
from bench.step_processes import run_apart
from bench.step_report import draw, print_results
from bench.step_scaling import SERIES, measure_series
from bench.step_subjects import (
    DIGITS,
    MAIN,
    NASBENCH,
    SUBJECTS,
    Case,
    Subject,
    TrainingStep,
    bilevel_steps,
    build_contenders,
    load_batches,
)
from bench.step_turns import take_turns
from bench.timing import Timings
from dssp_kernels.backend import implementation_for

STOCKS = ("stock", "stock_channels_last")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Exit status 1: loss or gradients of ours are not those of stock; such a case is RED, without speed-up.",
    )
    add = parser.add_argument
    add("--device", type=torch.device, help="cpu or cuda (default: cuda where there is one)")
    add(
        "--quick",
        action="store_true",
        help="few rounds, no torch.compile; on a CPU, where it takes two minutes on two cores, neither bilevel steps, "
        "kinds of operation, scaling nor the first step",
    )
    cases = f"{MAIN} {NASBENCH} {DIGITS}"
    add("--cases", type=Case.parse, nargs="+", metavar="CASE", help=f"default: {cases}, on a GPU also larger")
    add("--rounds", type=positive, help="rounds that count (default: 7; --quick: 3, on a CPU 2)")
    add("--scaling", choices=SERIES, nargs="*", help="what to vary (default: all; --quick on a CPU: nothing)")
    add(
        "--scaling-case",
        type=Case.parse,
        metavar="CASE",
        help="around which (default: the first case; --quick: a quarter)",
    )
    add("--first-step", action=argparse.BooleanOptionalAction, help="also the first step of a fresh process")
    add("--compile-timeout", type=float, metavar="S", help="for torch.compile; 0 = leave out (default: 60; --quick: 0)")
    add("--threads", type=positive, help="CPU threads (default: all cores)")
    add("--out", type=Path, default=results.ROOT / "bench" / "results" / "latest", help="folder for JSON and plot")
    add("--json", type=Path, help="another file for the same JSON")
    args = parser.parse_args(argv)
    fill_defaults(args)
    return args


def fill_defaults(args: argparse.Namespace) -> None:
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = args.device.type == "cuda"
    args.brief = args.quick and not on_gpu  # there, all of it takes a minute
    larger = [Case("darts", 16, 8, batch) for batch in (64, 256)] if on_gpu else []
    args.cases = args.cases or [MAIN, *larger, NASBENCH, DIGITS]
    args.rounds = args.rounds or (2 if args.brief else 3 if args.quick else 7)
    if args.scaling is None:
        args.scaling = [] if args.brief else list(SERIES)
    if args.first_step is None:
        args.first_step = not args.brief
    args.scaling_case = args.scaling_case or smaller(args.cases[0], 4 if args.quick else 1)
    if args.compile_timeout is None:
        args.compile_timeout = 0.0 if args.quick else 60.0


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


def smaller(case: Case, factor: int) -> Case:
    return Case(case.subject, case.channels, case.cells, max(1, case.batch // factor))


def measure(case: Case, subject: Subject, device: torch.device, rounds: int, brief: bool) -> Row:
    """Everything about one case; if `brief`, without bilevel steps and kinds of operation."""
    data = subject.load(device)
    train, valid = load_batches(case, data)
    nets = build_contenders(case, subject, data, device)
    steps = {name: TrainingStep(net, train, contiguous=name == "stock") for name, net in nets.items()}
    phases = {name: step.phases for name, step in steps.items()}
    say(f"[{case}] training step, memory")
    if brief:  # the steps whose memory is measured are the warm-up of those that are timed
        peaks = peak_of_steps(steps, device)
        timings = take_turns(phases, device, rounds, warm_up=False)
    else:
        timings = take_turns(phases, device, rounds)
        peaks = peak_of_steps(steps, device)
    say(f"[{case}] agreement")
    found = row(case, timings, agreement(steps, subject.renamed, train), peaks)
    if not brief:
        say(f"[{case}] kinds of operation")
        found["kinds"] = {name: share_by_kind(steps[name], device) for name in ("stock", "ours")}
        say(f"[{case}] bilevel step")  # last, because it changes the weights
        bilevel = take_turns(bilevel_steps(case, subject, data, nets, train, valid), device, rounds)["step"]
        found |= bilevel_row(bilevel, green=found["accuracy"] == "green")
    return found


def peak_of_steps(steps: Mapping[str, TrainingStep], device: torch.device) -> dict[str, int]:
    """Most bytes a step holds at once beyond weights, buffers and batch: activations and all gradients.

    Of the stock ones only in contiguous memory: in channels_last it holds the same.
    """
    measured = {name: step for name, step in steps.items() if name == "stock" or not name.startswith("stock")}
    for step in measured.values():
        step.zero_grad()
    return peak_memory(measured, device)


def row(case: Case, timings: Mapping[str, Timings], errors: Mapping[str, float], peaks: Mapping[str, int]) -> Row:
    green, step = is_green(errors), timings["step"]
    fused = {}
    if "stock_fused" in step.seconds:
        fused["stock_fused_speedup"] = step.ratio("stock_channels_last", "stock_fused") if green else None
    return {
        "name": str(case),
        **{f"{name}_seconds": step.median(name) for name in step.seconds},
        **errors,
        "accuracy": "green" if green else "red",
        "speedup": {name: step.ratio(name, "ours") if green else None for name in STOCKS},
        **fused,
        "half_pruned_share": step.ratio("ours_half_pruned", "ours"),
        **{f"{name}_peak_bytes": peak for name, peak in peaks.items()},
        "peak_share": peaks["ours"] / peaks["stock"],
        **{f"{phase}_seconds": medians(timings[phase]) for phase in ("forward", "backward")},
        "rounds": step.rounds,
        "spread": {name: step.spread(name) if step.rounds > 1 else 0.0 for name in step.seconds},
    }


def bilevel_row(bilevel: Timings, green: bool) -> Row:
    return {
        "bilevel_seconds": medians(bilevel),
        "bilevel_speedup": {name: bilevel.ratio(name, "ours") if green else None for name in STOCKS},
        "bilevel_rounds": bilevel.rounds,
    }


def say(stage: str) -> None:
    print(stage, file=sys.stderr, flush=True)


def medians(timings: Timings) -> dict[str, float]:
    return {name: timings.median(name) for name in timings.seconds}


def run(args: argparse.Namespace, subjects: Mapping[str, Subject]) -> dict[str, Any]:
    cases, scaling = [], []
    for case in args.cases:
        cases.append(measure(case, subjects[case.subject], args.device, args.rounds, args.brief))
    for name in args.scaling:
        say(f"[scaling] {name}")
        subject, rounds = subjects[args.scaling_case.subject], min(args.rounds, 2 if args.quick else 5)
        scaling.append(measure_series(name, args.scaling_case, subject, args.device, rounds, args.quick))
    main_case = args.cases[0]
    first, compiled = {}, {}
    if args.first_step:
        say("[first step]")
        first[str(main_case)] = run_apart("first-step", main_case, args.device)
    if args.compile_timeout:
        say("[torch.compile]")
        with empty_compile_cache():
            compiled[str(main_case)] = run_apart("compile", main_case, args.device, args.compile_timeout)
    return {
        "machine": results.machine(args.device) | {"implementation": implementation_for(args.device)},
        "versions": results.versions(),
        "commit": results.commit(),
        "cases": cases,
        "scaling": scaling,
        "first_step": first,
        "torch_compile": compiled,
    }


def main(argv: Sequence[str] | None = None, subjects: Mapping[str, Subject] = SUBJECTS) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on both sides
    start = time.perf_counter()
    found = run(args, subjects)
    found |= {"command": list(sys.argv[1:] if argv is None else argv), "seconds": time.perf_counter() - start}
    print_results(found)
    for path in filter(None, [args.out / "search_step.json", args.json]):
        results.write_json(path, found)
        print(f"JSON: {path}")
    plot = args.out / "search_step.png"
    print(f"Plot: {plot}" if draw(plot, found) else "Plot: skipped, matplotlib is not installed")
    return 1 if any(row["accuracy"] == "red" for row in found["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
