"""Which cases a run measures, and in which passes torch.compile takes part there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product

import torch

from bench.baselines import PASSES
from bench.cases import Case

DARTS_SHAPES = ((64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8))
LARGE_SHAPE = (128, 64, 64, 64)  # 64 MiB per tensor in 16 bits, 128 MiB in 32: larger than any cache
SMALL_SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (4, 16, 8, 8), (16, 16, 16, 16))
Planned = tuple[Case, Sequence[str]]  # with the passes that torch.compile takes part in


def planned_cases(args: argparse.Namespace) -> list[Planned]:
    """Every case of a run; a quick one on a CPU compiles only what fits in a minute."""
    brief = args.quick and args.device.type == "cpu"
    compiled = [*edge_cases(args), *node_cases(args)]
    plan: list[Planned] = [(case, ()) for case in small_cases(args)]
    plan += [(case, brief_passes(case, args) if brief else tuple(PASSES)) for case in compiled]
    plan += [(case, ()) for case in pruned_cases(args)]  # compiled code knows no pruned edge: nothing new
    return [(case, passes) for case, passes in plan if case.is_possible]


def brief_passes(case: Case, args: argparse.Namespace) -> Sequence[str]:
    """What to compile where time is short: the main layout, without BatchNorm, which takes twice as long to compile."""
    return ("forward+backward",) if case.layout == main_layout(args) and not case.folded else ()


def main_layout(args: argparse.Namespace) -> str:
    """The layout of what is measured in one layout only: channels_last, what dssp searches in."""
    return "channels_last" if "channels_last" in args.layouts else args.layouts[0]


def small_cases(args: argparse.Namespace) -> list[Case]:
    """Where a call costs more than its elements."""
    layouts = [main_layout(args)] if args.quick else args.layouts
    return [
        Case(shape, layout, args.dtypes[0], args.k[0], folded=folded)
        for shape, layout, folded in product(args.small_shapes, layouts, (False, True))
    ]


def edge_cases(args: argparse.Namespace) -> list[Case]:
    """Every combination as a single edge, plain and with BatchNorm; quick: BatchNorm for one layout, dtype and K."""
    plain = [Case(*values) for values in product(args.shapes, args.layouts, args.dtypes, args.k)]
    layouts, dtypes, candidates = args.layouts, args.dtypes, args.k
    if args.quick:
        layouts, dtypes, candidates = [main_layout(args)], dtypes[:1], candidates[:1]
    shapes = [shape for shape in args.shapes if not (args.quick and shape == LARGE_SHAPE)]
    return plain + [Case(*values, folded=True) for values in product(shapes, layouts, dtypes, candidates)]


def node_cases(args: argparse.Namespace) -> list[Case]:
    """A node of `--edges` edges, none pruned; not in a quick run, nor where its tensors would fill gigabytes."""
    if args.quick or args.edges == 1:
        return []
    shapes = [shape for shape in args.shapes if shape != LARGE_SHAPE]
    layout, dtype, candidates = main_layout(args), args.dtypes[0], args.k[0]
    return [
        Case(shape, layout, dtype, candidates, args.edges, folded=folded)
        for folded, shape in product((False, True), shapes)
    ]


def pruned_cases(args: argparse.Namespace) -> list[Case]:
    """The node at the smallest shape for each pruned share: removed, and in a full run also flagged and with BatchNorm.

    The share is what varies here; the first dtype and the first K stand for the others.
    """
    smallest = min(args.shapes, key=lambda shape: torch.Size(shape).numel())
    forms = [(False, False)] if args.quick else list(product((False, True), (False, True)))
    return [
        Case(smallest, main_layout(args), args.dtypes[0], args.k[0], args.edges, pruned, flagged, folded)
        for folded, flagged in forms
        for pruned in (round(share * args.edges) for share in args.pruned)
        if pruned
    ]
