"""Candidates of an edge that start with a separable convolution of its state: they run as one operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import stock_darts
from dssp.spaces import DARTS
from dssp.spaces.operations import build_candidate
from dssp_kernels import FusedMixedEdge
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.convolutions import normal
from tests.kernels.tensors import LAYOUTS

pytestmark = with_cpu_kernels


def darts_edge() -> FusedMixedEdge:
    return FusedMixedEdge(build_candidate(name, 8, 1) for name in DARTS.operations)


def stock_edge() -> FusedMixedEdge:
    """Of DARTS' own modules."""
    return FusedMixedEdge(stock_darts.MixedOp(8, 1)._ops)


X = LAYOUTS["channels_last"](normal(4, 8, 6, 6))
edges = pytest.mark.parametrize("make", [darts_edge, stock_edge], ids=["ours", "stock"])


def groups_behind(y: Tensor) -> list[int]:
    """How many convolutions there are in each group behind y that autograd knows, sorted."""
    found, left = {}, [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found[node] = node.name(), len(node.next_functions) // 2  # x, and two weights each
            left += [before for before, _ in node.next_functions]
    return sorted(size for name, size in found.values() if name == "_SeparableConv2dGroupBackward")


@edges
def test_an_edge_runs_what_its_candidates_start_with_as_one_operation(make: Callable[[], FusedMixedEdge]) -> None:
    assert groups_behind(make()(X.clone().requires_grad_())) == [1, 1, 4]  # alone: the second halves of two of the four


@edges
def test_candidates_that_do_not_run_are_not_in_the_group(make: Callable[[], FusedMixedEdge]) -> None:
    edge, x = make(), X.clone().requires_grad_()
    first, second = (k for k, name in enumerate(DARTS.operations) if name in ("dil_conv_3x3", "dil_conv_5x5"))
    runs = [k in (1, first, second) for k in range(8)]
    outputs, _ = edge.candidate_outputs(x, training=True, runs=runs)
    assert [output is not None for output in outputs] == runs
    assert outputs[first].grad_fn is outputs[second].grad_fn
    edge.remove_candidate(first)
    outputs, _ = edge.candidate_outputs(x, training=True, runs=runs)
    assert groups_behind(outputs[second]) == [1]


@edges
def test_edges_whose_candidates_run_one_by_one_agree(
    make: Callable[[], FusedMixedEdge], monkeypatch: pytest.MonkeyPatch
) -> None:
    edge = make().eval()
    found = []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr("dssp_kernels.modules.separable_conv2d_group", lambda x, group: [c(x) for c in group])
        edge.zero_grad()
        x = X.clone().requires_grad_()
        edge(x).square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in edge.parameters())])
    torch.testing.assert_close(*found)


def test_candidate_with_a_hook_runs_on_its_own() -> None:
    edge = stock_edge()
    seen: list[Tensor] = []
    edge._ops[6].op[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert groups_behind(edge(X.clone().requires_grad_())) == [1, 1, 3] and len(seen) == 1
