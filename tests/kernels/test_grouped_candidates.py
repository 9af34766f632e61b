"""Candidates of an edge that start with a separable convolution of its state: they run as one operation."""

from __future__ import annotations

import copy
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
    """Two pairs of convolutions with a norm between, and two single ones."""
    assert groups_behind(make()(X.clone().requires_grad_())) == [6]


@edges
@pytest.mark.parametrize("change", ["hook", "evaluation", "affine", "cumulative average", "another norm"])
def test_norm_that_wants_to_run_by_itself_parts_a_pair(make: Callable[[], FusedMixedEdge], change: str) -> None:
    edge = make()
    candidate = edge._ops[DARTS.operations.index("sep_conv_3x3")]
    norm = candidate.op[3]
    seen: list[Tensor] = []
    if change == "hook":
        norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    elif change == "evaluation":
        norm.eval()
    elif change == "cumulative average":
        norm.momentum = None
    else:
        kinds = {"affine": torch.nn.BatchNorm2d(8), "another norm": torch.nn.GroupNorm(1, 8)}
        candidate.op[3] = kinds[change]
    assert groups_behind(edge(X.clone().requires_grad_())) == [1, 5]
    assert len(seen) == (change == "hook")


@edges
@pytest.mark.parametrize("training", [True, False])
def test_an_edge_gives_what_its_candidates_do(make: Callable[[], FusedMixedEdge], training: bool) -> None:
    edge = make().double().train(training)
    alone = copy.deepcopy(edge)
    x, weights = X.double(), torch.linspace(-1, 1, 8, dtype=torch.float64)
    found = edge(x.requires_grad_(), weights)
    outputs = [op(x) for op in alone._ops]
    mixed = sum(w * y for w, y in zip(weights.softmax(0), outputs, strict=True) if y is not None)
    expected = torch.sigmoid(alone.mask) * mixed
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(edge.state_dict(), alone.state_dict())
    leaves = [list(some._ops.parameters()) for some in (edge, alone)]
    first, second = (
        torch.autograd.grad(y.sin().sum(), [x, *of]) for y, of in zip((found, expected), leaves, strict=True)
    )
    torch.testing.assert_close(first, second)


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
    assert groups_behind(edge(X.clone().requires_grad_())) == [5] and len(seen) == 1
