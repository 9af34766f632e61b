"""Which cases a run measures, and the bytes each must move."""

from __future__ import annotations

import pytest
import torch

from bench.baselines import PASSES
from bench.cases import Case, make_inputs
from bench.edge_throughput import parse
from bench.grids import DARTS_SHAPES, planned_cases

CPU = torch.device("cpu")


def planned(*flags: str) -> list[tuple[Case, tuple[str, ...]]]:
    return [(case, tuple(passes)) for case, passes in planned_cases(parse(["--device=cpu", *flags]))]


def test_bytes_are_each_active_tensor_once_per_direction() -> None:
    case = Case((2, 3, 4, 4), candidates=7)
    assert case.tensor_bytes == 2 * 3 * 4 * 4 * 4
    assert case.minimum_bytes(backward=False) == (7 + 1) * case.tensor_bytes
    assert case.minimum_bytes(backward=True) == (7 + 1 + 2 * 7 + 1) * case.tensor_bytes


def test_batch_norm_reads_everything_twice_per_direction() -> None:
    case = Case((2, 3, 4, 4), candidates=7, folded=True)
    forward = 2 * 7 + 1  # statistics, then the sum
    assert case.minimum_bytes(backward=False) == forward * case.tensor_bytes
    assert case.minimum_bytes(backward=True) == (forward + 2 * (7 + 1) + 7) * case.tensor_bytes


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "batch_norm"])
def test_removed_edges_move_no_bytes_and_flagged_ones_only_their_zeros(folded: bool) -> None:
    removed = Case((2, 3, 4, 4), "contiguous", "bfloat16", 7, edges=4, pruned_edges=3, folded=folded)
    flagged = Case((2, 3, 4, 4), "contiguous", "bfloat16", 7, edges=4, pruned_edges=3, flagged=True, folded=folded)
    single = Case((2, 3, 4, 4), "contiguous", "bfloat16", 7, folded=folded)
    assert removed.minimum_bytes(backward=True) == single.minimum_bytes(backward=True)
    assert flagged.minimum_bytes(backward=False) == single.minimum_bytes(backward=False)
    assert flagged.minimum_bytes(backward=True) == single.minimum_bytes(backward=True) + 21 * single.tensor_bytes


def test_copies_of_inputs_share_no_norm() -> None:
    inputs = make_inputs(Case((2, 3, 4, 4), candidates=2, folded=True), CPU, seed=0)
    exact = inputs.to(dtype=torch.float64)
    assert inputs.norms is not None and exact.norms is not None
    for mine, theirs in zip(inputs.norms, exact.norms, strict=True):
        assert mine is not None and theirs is not None and theirs.running_mean is not None
        assert mine is not theirs and theirs.running_mean.dtype == torch.float64


def test_quick_run_compiles_training_in_channels_last_without_batch_norm() -> None:
    compiled = [case for case, passes in planned("--quick") if passes]
    assert [case.shape for case in compiled] == list(DARTS_SHAPES)
    assert {(case.layout, case.folded) for case in compiled} == {("channels_last", False)}
    assert {passes for _, passes in planned("--quick")} == {(), ("forward+backward",)}


def test_quick_run_has_one_pruned_node_and_the_smallest_shapes() -> None:
    cases = [case for case, _ in planned("--quick")]
    assert [(case.edges, case.pruned_edges, case.flagged) for case in cases if case.edges > 1] == [(5, 2, False)]
    small = [(case.shape, case.folded) for case in cases if case.shape not in DARTS_SHAPES]
    assert small == [((1, 1, 1, 1), False), ((2, 3, 5, 7), False), ((2, 3, 5, 7), True)]


def test_full_run_has_nodes_at_every_shape_and_prunes_them_both_ways() -> None:
    nodes = [(case, passes) for case, passes in planned() if case.edges > 1]
    whole = [case for case, passes in nodes if passes == tuple(PASSES)]
    assert [(case.shape, case.folded) for case in whole] == [
        (s, folded) for folded in (False, True) for s in DARTS_SHAPES
    ]
    pruned = [case for case, passes in nodes if not passes]
    assert [(case.folded, case.flagged) for case in pruned] == [
        (f, flag) for f in (False, True) for flag in (False, True)
    ]
    assert {(case.shape, case.pruned_edges) for case in pruned} == {((64, 64, 8, 8), 2)}


def test_batch_norm_needs_two_values_per_channel() -> None:
    cases = [case for case, _ in planned("--shapes", "1x5x1x1", "--small-shapes", "2x5x1x1")]
    assert {case.folded for case in cases if case.shape == (1, 5, 1, 1)} == {False}
    assert {case.folded for case in cases if case.shape == (2, 5, 1, 1)} == {False, True}


def test_a_node_of_one_edge_is_no_second_row_for_that_edge() -> None:
    cases = [case for case, _ in planned("--edges", "1")]
    assert len(cases) == len(set(cases))
